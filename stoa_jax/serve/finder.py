"""The functions of the page without the page: search, frames, questions, explanations."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from stoa_jax.errors import UserError
from stoa_jax.serve.library import GoneError, Library, printable
from stoa_jax.serve.uploads import Uploads

if TYPE_CHECKING:
    from stoa_jax.index.index import Hit, Index
    from stoa_jax.inference.explain import Explanation
    from stoa_jax.inference.model import Answer, Model
    from stoa_jax.inference.videos import Clip

Reply = TypeVar("Reply")
RESULTS = 8  # per search
ANSWERS = 3  # per question
MAX_TEXT = 500  # characters in a query


@dataclasses.dataclass(frozen=True)
class Moment:
    """A segment of a video of the library."""

    row: int
    name: str
    start: float | None
    end: float | None
    score: float = 0.0
    probability: float | None = None
    matched: bool | None = None
    gone: str = ""  # why it cannot be shown


class Finder:
    """An index with its model and the library of its videos.

    `detections` is a file or a directory of detections of the videos, as for `stoa_jax.Clip`.
    """

    def __init__(
        self,
        index: "Index",
        model: "Model",
        library: Library,
        uploads: Uploads,
        detections: str | Path | None = None,
    ):
        self.index, self.model, self.library, self.uploads = index, model, library, uploads
        self.detections = detections
        self.has = set(model.has)

    @property
    def explains(self) -> bool:
        """Whether the model can show what it matches to which word."""
        return "match" in self.has and bool(self.has & {"trajectories", "actions"})

    def search(self, text: str) -> list[Moment]:
        """Return the moments that fit a text best."""
        return [self._moment(hit) for hit in self.index.search(checked(text), RESULTS)]

    def search_clip(self, token: str) -> list[Moment]:
        """Return the moments that are most similar to an uploaded clip, and delete the clip."""
        with self.uploads.taken(token) as path:
            try:
                hits = self.index.search(path, RESULTS)  # a string would be a text
            except UserError as error:
                raise UserError(str(error).replace(str(path), "the uploaded clip")) from None
        return [self._moment(hit) for hit in hits]

    def _moment(self, hit: "Hit") -> Moment:
        row, gone = self.library.row(hit.id), ""
        name = printable(os.path.basename(hit.video or "") or hit.id)
        if row is None:
            gone = f"{name}: added after the page was started; restart it"
        else:
            try:
                self.library.check(row)
            except GoneError as error:
                gone = str(error)
        return Moment(
            -1 if row is None else row,
            name,
            *(hit.start, hit.end, hit.score, hit.probability, hit.matched),
            gone,
        )

    def caption(self, moment: Moment) -> str:
        """Return the model's caption of a moment."""
        (text,) = self._ask("caption", moment, lambda clip: self.model.caption([clip]))
        return text

    def answer(self, moment: Moment, question: str) -> "list[Answer]":
        """Return the likeliest answers to a question, with their probabilities."""
        question = checked(question)
        (found,) = self._ask(
            "answer", moment, lambda clip: self.model.answer([clip], [question], top=ANSWERS)
        )
        return found

    def explain(self, moment: Moment, text: str) -> "Explanation":
        """Return which trajectories and actions are matched to which words of a text."""
        text = checked(text)
        return self._ask("match", moment, lambda clip: self.model.explain(clip, text))

    def frames(self, moment: Moment) -> list[np.ndarray]:
        """Return the frames that the model samples from a moment."""
        from stoa_jax.data.video import read_frames

        def read(clip: "Clip") -> list[np.ndarray]:
            assert isinstance(clip.video, str)  # `_ask` makes it
            frames, _ = read_frames(clip.video, self.model.config.frames, clip.start, clip.end)
            return frames

        return self._ask("embed", moment, read)

    def _ask(self, head: str, moment: Moment, call: "Callable[[Clip], Reply]") -> Reply:
        """Call with the moment as a clip; errors name the video, not its path."""
        import stoa_jax

        if head not in self.has:
            raise UserError(f"this model cannot do that: it has {', '.join(sorted(self.has))}")
        opened = self.library.open(moment.row)
        opened.file.close()
        from stoa_jax.inference.detections import names_video  # it imports the data readers

        found = self.detections
        if found is not None and not names_video(found, opened.path):
            found = None  # the library may contain videos that the detector has not processed
        clip = stoa_jax.Clip(str(opened.path), moment.start, moment.end, found)
        try:
            return call(clip)
        except UserError as error:
            raise UserError(str(error).replace(str(opened.path), moment.name)) from None


def checked(text: str) -> str:
    """Return a typed text without surrounding space, or raise UserError."""
    text = (text or "").strip()
    if not text:
        raise UserError("type some text first")
    if len(text) > MAX_TEXT:
        raise UserError(f"the text has {len(text)} characters; the limit is {MAX_TEXT}")
    return text
