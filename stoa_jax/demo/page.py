"""The demonstration's page: one HTML file with animated clips, a table and learning curves."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from stoa_jax import film
from stoa_jax.demo import tables
from stoa_jax.report import matches, page

if TYPE_CHECKING:
    from stoa_jax.data.split import Split

HEIGHT = 288  # pixels of a clip
FRAME_MS = 350  # of the animation
COLOURS = ("var(--curve)", "var(--second)", "var(--third)")

STYLE = """
:root { --second: #b34700; --third: #6f42c1; }
@media (prefers-color-scheme: dark) { :root { --second: #f0883e; --third: #d2a8ff; } }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr));
  gap: 1rem; }
.clips .card { padding: 0; overflow: hidden; }
.clips .inside { padding: .75rem; }
.clips img { width: 100%; height: auto; display: block; image-rendering: pixelated; }
.said { font-size: 1.05rem; margin: 0 0 .25rem; }
.asked { margin: .5rem 0 0; padding: 0; list-style: none; font-size: .95rem; }
.asked li { border-top: 1px solid var(--line); padding: .3rem 0; }
.asked b { white-space: nowrap; }
.plot { max-width: 38rem; }
td small { display: block; color: var(--soft); white-space: normal; }
.plot svg { width: 100%; height: auto; display: block; }
.key { display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin: .25rem 0; font-size: .95rem; }
.key i { display: inline-block; width: 1.2em; height: .25em; margin-right: .4em;
  vertical-align: middle; }
"""


class Curve(NamedTuple):
    """Accuracy in percent by training step."""

    steps: Sequence[float]
    values: Sequence[float]


def cards(model: str | Path, split: "Split", predictions: Mapping[str, Any], count: int) -> str:
    """Return cards of the first clips of a split: frames, captions and answers."""
    import stoa_jax

    opened = stoa_jax.load(model)
    questions = by_video(predictions.get("qa", {}))
    captions = predictions.get("captioning/greedy", {})
    found = []
    for i in range(min(count, len(split))):
        about, record = split.metadata(i), split.read(i)
        frames = frames_of(record)
        seen = stoa_jax.Detections(
            record["boxes"], record["classes"], record["scores"], tuple(split.class_names)
        )
        caption = captions.get(about.video_id, "")
        explanation = opened.explain(stoa_jax.Clip(frames, detections=seen), about.texts[0])
        found.append(card(frames, explanation, about, caption, questions.get(about.video_id, [])))
    return f'<div class="clips">{"".join(found)}</div>'


def frames_of(record: Mapping[str, Any]) -> list[np.ndarray]:
    """Decode the frames of a record."""
    from stoa_jax.data.records import decode_jpeg

    return [decode_jpeg(jpeg) for jpeg in record["frames"]]


def card(
    frames: Sequence[np.ndarray],
    explanation: Any,
    about: Any,
    caption: str,
    questions: Sequence[tuple[str, str, str]],
) -> str:
    """Format one clip: animation, caption, matches, questions."""
    boxes, shown = matches.stacked(explanation)
    label = f"animation of {len(frames)} frames: {about.texts[0]}"
    picture = animated(frames, boxes, shown, label)
    matched = [
        f'<li style="border-left-color:{film.hex_colour(i)}">'
        f"{matches.match_line(trajectory.name, trajectory)}</li>"
        for i, trajectory in enumerate(explanation.trajectories)
    ]
    matched += [
        f"<li>{matches.match_line(f'action {i + 1}', action)}</li>"
        for i, action in enumerate(explanation.actions)
    ]
    asked = "".join(
        f"<li>{page.text(question)} <b class={'good' if said == right else 'bad'}>"
        f"{page.text(said)} {'✓' if said == right else '✗'}</b>"
        f"{'' if said == right else f' <span class=soft>it is {page.text(right)}</span>'}</li>"
        for question, said, right in questions
    )
    return f"""<article class="card">{picture}<div class="inside">
<p class="said">“{page.text(caption.strip() or "no caption")}”</p>
<p class="soft">Reference: {page.text(about.texts[0])}</p>
<ul class="matches" aria-label="matches with the words of the reference">{"".join(matched)}</ul>
<ul class="asked">{asked}</ul></div></article>"""


def animated(frames: Sequence[np.ndarray], boxes: np.ndarray, shown: np.ndarray, label: str) -> str:
    """Return a looping animation, replaced by its middle frame if the reader prefers no motion."""
    from PIL import Image

    pictures = [
        Image.fromarray(
            film.strip([frame], boxes[:, t : t + 1], shown[:, t : t + 1], height=HEIGHT)
        )
        for t, frame in enumerate(frames)
    ]
    out = io.BytesIO()
    pictures[0].save(
        out,
        format="webp",
        save_all=True,
        append_images=pictures[1:],
        duration=[FRAME_MS] * (len(pictures) - 1) + [3 * FRAME_MS],
        loop=0,
        quality=70,
        method=4,
    )
    moving = "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()
    still = film.data_address(np.asarray(pictures[len(pictures) // 2]))
    return (
        f'<picture><source media="(prefers-reduced-motion: reduce)" srcset="{still}">'
        f'<img src="{moving}" alt="{page.text(label)}" width="{HEIGHT}" height="{HEIGHT}">'
        "</picture>"
    )


def by_video(rows: Mapping[str, Mapping[str, str]]) -> dict[str, list[tuple[str, str, str]]]:
    """Group (question, answer, right answer) by video, from keys `number: video: question`."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    for key, row in rows.items():
        _, video, question = key.split(": ", 2)
        found.setdefault(video, []).append((question, row["answer"], row["right"]))
    return found


def results_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Format the table of results."""
    body = [[page.text(cell) for cell in row] for row in tables.rows(results)]
    body = [
        [row[0], row[1], f"<b>{row[2]}</b>", row[3].replace(" (", "<small>(", 1), *row[4:]]
        for row in body
    ]
    body = [[cell + "</small>" if "<small>" in cell else cell for cell in row] for row in body]
    return page.table(tables.HEADER, body, numbers=range(1, len(tables.HEADER)))


def training(summary: str, curves: Mapping[str, Curve]) -> str:
    """Format act two: its summary and the learning curves."""
    key = "".join(
        f'<span><i style="background:{colour}"></i>{page.text(name)}</span>'
        for colour, name in zip(COLOURS, curves, strict=False)
    )
    return (
        f"<p>{page.text(summary)}</p>"
        '<p class="soft">Accuracy on training questions, in percent, by training step; the steps '
        "are spaced logarithmically.</p>"
        f'<div class="key">{key}</div><div class="plot">{plot(curves)}</div>'
    )


def plot(curves: Mapping[str, Curve], width: int = 480, height: int = 280) -> str:
    """Return learning curves as an SVG element that follows the page's colours."""
    left, bottom, top, right = 52, 34, 10, 30
    last = max(max(curve.steps) for curve in curves.values())
    first = min(min(curve.steps) for curve in curves.values())
    low, high = np.log10(first), max(np.log10(last), np.log10(first) + 1e-9)

    def x(step: float) -> float:
        return left + (np.log10(step) - low) / (high - low) * (width - left - right)

    def y(value: float) -> float:
        return height - bottom - value / 100 * (height - bottom - top)

    parts = []
    for value in range(0, 101, 25):
        parts.append(
            f'<line x1="{left}" x2="{width - right}" y1="{y(value):.1f}" y2="{y(value):.1f}" '
            'stroke="var(--line)"/>'
            f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value} %</text>'
        )
    for step in (10**e * m for e in range(7) for m in (1, 3)):
        if first <= step <= last:
            parts.append(
                f'<text x="{x(step):.1f}" y="{height - bottom + 18}" text-anchor="middle">'
                f"{step:,}</text>"
            )
    for colour, curve in zip(COLOURS, curves.values(), strict=False):
        values = smoothed(curve.values)
        points = " ".join(
            f"{x(s):.1f},{y(v):.1f}" for s, v in zip(curve.steps, values, strict=True)
        )
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
    said = "; ".join(
        f"{name}: {smoothed(curve.values)[-1]:.0f} % after {curve.steps[-1]:,} steps"
        for name, curve in curves.items()
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{page.text(said)}" '
        f'font-size="14" fill="currentColor">{"".join(parts)}</svg>'
    )


def smoothed(values: Sequence[float], window: int = 5) -> list[float]:
    """Return the running mean of the last values."""
    return [float(np.mean(values[max(0, i - window + 1) : i + 1])) for i in range(len(values))]


def full_document(
    results: Sequence[Mapping[str, Any]],
    clips: str,
    steps: Sequence[Mapping[str, Any]],
    seconds: Mapping[str, float],
) -> str:
    """Return the page of the full pipeline; `steps` are rows of pre-training's `metrics.jsonl`."""
    from stoa_jax.report import curves

    found = {
        name: values
        for name, values in curves.series(steps).items()
        if name.startswith("loss_") or name == "batch_r1"
    }
    plots = [
        page.figure(name, curves.plot(name, x.tolist(), y.tolist(), f"plot{i}"))
        for i, (name, (x, y)) in enumerate(found.items())
    ]
    took = page.table(
        ("part", "seconds"), [(page.text(k), f"{v:.0f}") for k, v in seconds.items()], numbers=[1]
    )
    return _page(
        "The tiny model, pre-trained and fine-tuned on this machine. Boxes are the detector's, "
        "coloured by trajectory. Each trajectory is listed with the noun that it was matched to, "
        "each action with its verb.",
        [
            ("Clips of the test split", clips),
            ("How good it is", results_table(results)),
            ("Pre-training", f'<div class="grid">{"".join(plots)}</div>'),
            ("Time", took),
        ],
    )


def document(results: Sequence[Mapping[str, Any]], clips: str, act_two: str) -> str:
    """Return the whole page."""
    lead = (
        "Coloured shapes whose motions only show over time. Every clip below is new to the model, "
        "which ships with the package. Boxes are the detector's, coloured by trajectory. Each "
        "trajectory is listed with the noun of the reference that it was matched to, each action "
        "with its verb. In quotes is the model's own caption."
    )
    return _page(
        lead,
        [
            ("Act one: the shipped model", clips),
            ("How good it is", results_table(results)),
            ("Act two: training from scratch", act_two),
        ],
    )


def _page(lead: str, sections: Sequence[tuple[str, str]]) -> str:
    text = page.document("STOA-VLP in JAX: the demonstration", lead, [], sections)
    return text.replace("</style>", f"{STYLE}</style>", 1)
