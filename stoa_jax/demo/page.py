"""The page: tables, curves and clips as one HTML file that needs nothing beside it."""

import base64
import dataclasses
import html
import io
from collections.abc import Iterable, Mapping, Sequence

import cv2
import numpy as np

from stoa_jax.demo.explain import NONE, Explanation

# One colour a trajectory, told apart by people who see colours differently.
PALETTE = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
    (200, 200, 200),
)

STYLE = """
:root { color-scheme: light dark; --line: #8884; --weak: #888; --good: #2a8f5b; --bad: #c0392b; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.weak { color: var(--weak); } .good { color: var(--good); } .bad { color: var(--bad); }
.clip { border: 1px solid var(--line); border-radius: .5rem; padding: 1rem; margin: 1rem 0; }
.clip img { width: 100%; image-rendering: pixelated; border-radius: .25rem; }
.matches { display: flex; flex-wrap: wrap; gap: .4rem; padding: 0; margin: .5rem 0;
  list-style: none; }
.matches li { border: 1px solid var(--line); border-left: .5rem solid; border-radius: .25rem;
  padding: 0 .5rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: .5rem 0; }
dt { color: var(--weak); } dd { margin: 0; }
"""


@dataclasses.dataclass
class ClipView:
    """What the page shows of one clip."""

    title: str
    pixels: np.ndarray  # uint8 [T, S, S, 3]
    boxes: np.ndarray  # [T, K, 4] in [0, 1]
    classes: np.ndarray  # [T, K]
    trajectories: Sequence[int]  # class ids, in the model's order
    explanation: Explanation
    facts: Sequence[tuple[str, str, bool | None]]  # (what, said, right, wrong or neither)


def film(view: ClipView, height: int = 160) -> np.ndarray:
    """The clip's frames in a row, its trajectories boxed in their colours: uint8 [h, w, 3]."""
    scale = height / view.pixels.shape[1]
    colour = {c: PALETTE[i % len(PALETTE)] for i, c in enumerate(view.trajectories) if c >= 0}
    frames = []
    for pixels, boxes, classes in zip(view.pixels, view.boxes, view.classes, strict=True):
        frame = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)
        side = np.array([frame.shape[1], frame.shape[0]] * 2)
        for box, kind in zip(boxes, classes, strict=True):
            if kind in colour:
                x1, y1, x2, y2 = (int(v) for v in np.round(box * (side - 1)))
                cv2.rectangle(frame, (x1, y1), (x2, y2), (0, 0, 0), 3)
                cv2.rectangle(frame, (x1, y1), (x2, y2), colour[kind], 1)
        frames += [frame, np.full((frame.shape[0], 4, 3), 128, np.uint8)]
    return np.concatenate(frames[:-1], 1)


def png(image: np.ndarray) -> str:
    """An RGB picture as a data address."""
    ok, data = cv2.imencode(".png", image[..., ::-1])
    assert ok
    return "data:image/png;base64," + base64.b64encode(data.tobytes()).decode()


def curves(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], columns: int = 3) -> str:
    """Small plots, one a series (steps, values), as one picture's data address."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = -(-len(series) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 2.6 * rows), squeeze=False)
    for axis in axes.flat[len(series) :]:
        axis.axis("off")
    for axis, (name, (steps, values)) in zip(axes.flat, series.items(), strict=False):
        axis.plot(steps, values, color="#0072b2")
        axis.set_title(name)
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=90)
    plt.close(figure)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table; a cell that is a number is set to the right."""

    def cell(tag: str, text: str) -> str:
        number = text.replace(".", "", 1).replace("-", "", 1).isdigit()
        kind = ' class="number"' if number else ""
        return f"<{tag}{kind}>{html.escape(text)}</{tag}>"

    head = "".join(cell("th", text) for text in header)
    body = "\n".join("<tr>" + "".join(cell("td", t) for t in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def clip_section(view: ClipView) -> str:
    """One clip: film, matches, and what the model said."""

    def match(name: str, word: str, score: float, colour: tuple[int, int, int]) -> str:
        shown = "none of the words" if word == NONE else word
        weak = ' class="weak"' if word == NONE else ""
        return (
            f'<li style="border-left-color: rgb{colour}">{html.escape(name)} → '
            f"<b{weak}>{html.escape(shown)}</b> <span class=weak>{score:.2f}</span></li>"
        )

    objects = [
        match(m.name, m.word, m.score, PALETTE[i % len(PALETTE)])
        for i, m in enumerate(view.explanation.trajectories)
    ]
    actions = [match(m.name, m.word, m.score, (128, 128, 128)) for m in view.explanation.actions]
    mark = {True: ' <b class="good">✓</b>', False: ' <b class="bad">✗</b>', None: ""}
    facts = "\n".join(
        f"<dt>{html.escape(what)}</dt><dd>{html.escape(said)}{mark[right]}</dd>"
        for what, said, right in view.facts
    )
    matched = "".join(f'<ul class="matches">{"".join(x)}</ul>' for x in (objects, actions) if x)
    return f"""<section class="clip"><h3>{html.escape(view.title)}</h3>
<img alt="{len(view.pixels)} frames with boxes" src="{png(film(view))}">
{matched}
<dl>
{facts}
</dl></section>"""


def page(title: str, lead: str, sections: Sequence[tuple[str, str]]) -> str:
    """The whole page, from (heading, HTML) sections."""
    body = "\n".join(f"<h2>{html.escape(head)}</h2>\n{content}" for head, content in sections)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}</style></head>
<body><h1>{html.escape(title)}</h1>
<p class="weak">{html.escape(lead)}</p>
{body}
</body></html>
"""
