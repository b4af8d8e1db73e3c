"""The page in Gradio: its elements and their events.

Gradio gets no files and serves none: images are in the page, videos come from /clip, and clips to
search by are sent to /upload.
"""

import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # send no usage data

import gradio as gr
from fastapi import FastAPI
from gradio import themes

from stoa_jax.errors import UserError
from stoa_jax.serve import fragments
from stoa_jax.serve.finder import RESULTS, Finder, Moment

TITLE = "STOA: find a moment"
_MODEL = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}


def mount(app: FastAPI, finder: Finder, examples: Sequence[str] = ()) -> FastAPI:
    """Mount the page at the root of an application."""
    return gr.mount_gradio_app(
        app,
        blocks(finder, examples),
        path="/",
        theme=themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css=fragments.STYLE,
        head=fragments.SCRIPT,
        footer_links=[],
        show_error=True,
        ssr_mode=False,
        pwa=False,
    )


def blocks(finder: Finder, examples: Sequence[str] = ()) -> gr.Blocks:
    """Build the page."""
    limits = finder.uploads
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.HTML(fragments.header())
        with gr.Row(elem_id="search-row", equal_height=True):
            query = gr.Textbox(
                label="Describe the moment",
                placeholder=examples[0] if examples else "a dog catches a ball",
                elem_id="query",
                scale=5,
                max_lines=1,
            )
            search = gr.Button("Search", variant="primary", elem_id="search", scale=1)
        samples = []
        if examples:
            with gr.Row(elem_id="examples"):
                for example in examples:
                    samples.append(gr.Button(example, size="sm", variant="secondary"))
        with gr.Accordion("Search by a clip", open=False, elem_id="by-clip"):
            gr.HTML(fragments.upload_field(limits.max_bytes, limits.max_seconds))
            search_clip = gr.Button("Search by this clip", elem_id="search-clip")
        status = gr.HTML("", elem_id="status")
        results = _Results()
        with gr.Column(visible=False, elem_id="closer") as closer:
            title = gr.HTML("", elem_id="title")
            with gr.Row():
                with gr.Column(min_width=300, scale=2):
                    player = gr.HTML("", elem_id="player")
                    caption = gr.HTML("", elem_id="caption")
                    question = gr.Textbox(
                        label="A question about the clip",
                        elem_id="question",
                        max_lines=1,
                        visible="answer" in finder.has,
                    )
                    ask = gr.Button("Ask", elem_id="ask", visible="answer" in finder.has)
                    answer = gr.HTML("", elem_id="answer")
                with gr.Column(min_width=300, scale=3):
                    said = gr.Textbox(
                        label="A sentence to match with the clip",
                        elem_id="sentence",
                        max_lines=1,
                        visible=finder.explains,
                    )
                    explain = gr.Button(
                        "Show what matches", elem_id="explain", visible=finder.explains
                    )
                    problem = gr.HTML("", elem_id="problem")
                    film = gr.HTML("", elem_id="film")
        found = gr.State([])  # moments of the last search
        chosen = gr.State(None)  # the selected moment
        token, upload_error = gr.Textbox(visible=False), gr.Textbox(visible=False)

        shown = [status, found, closer, *results.outputs]
        detail = [closer, title, player, caption, said, problem, film, answer, chosen]

        by_text = {"inputs": [query], "outputs": shown, **_MODEL}
        text_search = _guarded(functools.partial(_search, finder), shown, status)
        search.click(text_search, **by_text)
        query.submit(text_search, **by_text)
        for sample in samples:
            sample.click(lambda text: text, sample, query, api_visibility="private").then(
                text_search, **by_text
            )
        search_clip.click(
            _guarded(functools.partial(_search_clip, finder), shown, status),
            [token, upload_error],
            shown,
            js=f"() => stoaUpload({limits.max_bytes})",
            **_MODEL,
        )
        for i, button in enumerate(results.buttons):
            button.click(
                _guarded(functools.partial(_look, finder, i), detail, problem),
                [found, query],
                detail,
                **_MODEL,
            ).then(None, js="() => stoaShow('closer')")
        explained = {"inputs": [chosen, said], "outputs": [problem, film], **_MODEL}
        show = _guarded(functools.partial(_explain, finder), [problem, film], problem)
        explain.click(show, **explained)
        said.submit(show, **explained)
        asked = {"inputs": [chosen, question], "outputs": [answer], **_MODEL}
        reply = _guarded(functools.partial(_answer, finder), [answer], answer)
        ask.click(reply, **asked)
        question.submit(reply, **asked)
    return page


class _Results:
    """Slots for the results of a search, empty at first."""

    def __init__(self):
        self.cards, self.players, self.buttons = [], [], []
        with gr.Row(elem_id="results"):
            for i in range(RESULTS):
                with gr.Column(visible=False, min_width=0) as card:
                    self.cards.append(card)
                    self.players.append(gr.HTML(""))
                    self.buttons.append(
                        gr.Button(f"Look closer at {i + 1}", size="sm", elem_id=f"look-{i + 1}")
                    )

    @property
    def outputs(self) -> list[Any]:
        return [*self.cards, *self.players, *self.buttons]

    @staticmethod
    def updates(moments: Sequence[Moment]) -> list[Any]:
        """Return the updates that fill the slots with these moments."""
        there = [i < len(moments) for i in range(RESULTS)]
        return [
            *(gr.Column(visible=t) for t in there),
            *(fragments.result(i + 1, moments[i]) if t else "" for i, t in enumerate(there)),
            *(gr.Button(interactive=t and not moments[i].gone) for i, t in enumerate(there)),
        ]


def _guarded(work: Callable[..., Any], outputs: Sequence[Any], place: Any) -> Callable[..., Any]:
    """Show an error of `work` as one message in `place`, and leave the other outputs unchanged."""

    def failed(said: str) -> dict[Any, Any]:
        return {place: fragments.message(said, error=True)}

    def run(*inputs: Any) -> Iterator[Any]:
        try:
            for values in work(*inputs):
                yield dict(zip(outputs, values, strict=True)) if len(outputs) > 1 else values[0]
        except UserError as error:
            said = failed(str(error))
        except Exception:  # the boundary of a request: the log has the traceback
            logging.getLogger(__name__).exception("the page failed")
            said = failed("something went wrong; the server's log says what")
        else:
            return
        yield said if len(outputs) > 1 else said[place]

    return run


def _search(finder: Finder, query: str) -> Iterator[list[Any]]:
    moments = finder.search(query)
    yield _shown(moments, f"“{query.strip()}”")


def _search_clip(finder: Finder, token: str, error: str) -> Iterator[list[Any]]:
    if error or not token:
        raise UserError(error or "choose a video file first")
    yield _shown(finder.search_clip(token), "your clip")


def _shown(moments: list[Moment], query: str) -> list[Any]:
    return [
        fragments.summary(moments, query),
        moments,
        gr.Column(visible=False),
        *_Results.updates(moments),
    ]


def _look(finder: Finder, i: int, moments: list[Moment], query: str) -> Iterator[list[Any]]:
    """Yield the player immediately, then the caption, then the matches of the query or caption."""
    moment = moments[i]
    text = (query or "").strip()
    seen = [gr.Column(visible=True), fragments.title(moment), fragments.player(moment)]
    yield [*seen, "", text, "", "", "", moment]
    caption = finder.caption(moment) if "caption" in finder.has else ""
    text = text or caption
    told = fragments.caption(caption) if "caption" in finder.has else ""
    yield [*seen, told, text, "", "", "", moment]
    if finder.explains and text:
        film = fragments.explanation(finder.explain(moment, text))
    else:
        why = "This model has neither trajectories nor actions: it matches whole clips and texts."
        film = fragments.plain_film(finder.frames(moment), "" if finder.explains else why)
    yield [*seen, told, text, "", film, "", moment]


def _explain(finder: Finder, moment: Moment | None, text: str) -> Iterator[list[Any]]:
    yield ["", fragments.explanation(finder.explain(_chosen(moment), text))]


def _answer(finder: Finder, moment: Moment | None, question: str) -> Iterator[list[Any]]:
    yield [fragments.answers(question, finder.answer(_chosen(moment), question))]


def _chosen(moment: Moment | None) -> Moment:
    if moment is None:
        raise UserError("look closer at a result first")
    return moment
