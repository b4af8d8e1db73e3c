"""A contact sheet of a split: frames with boxes and classes, and the captions below them.

Nouns that name a class in the clip are underlined and marked in the colour of that class, so that
you see at a glance whether boxes, frames and words belong together.
"""

import colorsys
import itertools
import textwrap
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FRAME_HEIGHT, FRAMES, CLIPS, TEXTS = 200, 4, 8, 3
_MARGIN, _LINE, _LABEL = 8, 20, 13
_IRREGULAR = {"men": "man", "women": "woman", "children": "child", "people": "person"}


def draw(
    clips: Sequence[dict],
    class_names: Sequence[str],
    nouns: Sequence[Sequence[Sequence[str]]],
    path: Path,
) -> None:
    """Write a PNG of some clips.

    Each clip is {"video_id", "frames": [T] of uint8 [H, W, 3], "boxes" [T, K, 4], "classes" [T, K],
    "scores" [T, K], "texts", "answers"}; `nouns[i][j]` are the nouns of its text j.
    """
    strips = [_strip(c, class_names, n) for c, n in zip(clips, nouns, strict=True)]
    width = max(s.width for s in strips)
    sheet = Image.new("RGB", (width, sum(s.height for s in strips)), "white")
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def matched(nouns: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Map nouns to the classes that they name by the full name or its last word, in any number."""
    found = {}
    for noun in nouns:
        forms = _forms(noun)
        for name in names:
            if forms & (_forms(name) | _forms(name.split()[-1])):
                found[noun] = name
                break
    return found


def _forms(word: str) -> set[str]:
    word = word.lower().strip()
    forms = {word, _IRREGULAR.get(word, word)}
    for ending, rest in (("ies", "y"), ("es", ""), ("s", "")):
        if word.endswith(ending) and len(word) > len(ending) + 2:
            forms.add(word.removesuffix(ending) + rest)
    return forms


def colour(class_id: int) -> tuple[int, int, int]:
    """Return a distinct colour for a class, dark enough to read on white."""
    hue = (class_id * 0.61803398875) % 1  # steps of the golden ratio keep neighbouring hues apart
    red, green, blue = (round(255 * x) for x in colorsys.hsv_to_rgb(hue, 0.95, 0.75))
    return red, green, blue


def _font(size: int):
    import matplotlib  # it ships a font with most scripts

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size)


def _strip(clip: dict, class_names: Sequence[str], nouns: Sequence[Sequence[str]]) -> Image.Image:
    total = len(clip["frames"])
    places = [int((i + 0.5) * total / min(FRAMES, total)) for i in range(min(FRAMES, total))]
    frames = [_frame(clip, t, class_names) for t in places]
    present = sorted({int(c) for c in np.unique(clip["classes"]) if c >= 0})
    names = {class_names[c] if c < len(class_names) else f"class {c}": c for c in present}
    width = max(720, sum(f.width + _MARGIN for f in frames) + _MARGIN)
    lines = _lines(clip, nouns, names, width)
    height = FRAME_HEIGHT + 3 * _MARGIN + _LINE * (len(lines) + 1)
    strip = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(strip)
    what = f"{len(present)} classes: {', '.join(names)}" if names else "no objects"
    title = f"{clip['video_id']} · {what}"
    pen.text((_MARGIN, 2), textwrap.shorten(title, width // 8), "black", _font(_LABEL))
    left = _MARGIN
    for t, frame in zip(places, frames, strict=True):
        strip.paste(frame, (left, _LINE + _MARGIN))
        pen.text((left + 3, _LINE + FRAME_HEIGHT - 8), f"{t}", "white", _font(11), stroke_width=1,
                 stroke_fill="black")  # fmt: skip
        left += frame.width + _MARGIN
    top = FRAME_HEIGHT + _LINE + 2 * _MARGIN
    for line in lines:
        left = _MARGIN
        for word, class_id in line:
            font = _font(_LABEL)
            end = left + pen.textlength(word, font)
            ink = "black" if class_id is None else colour(class_id)
            pen.text((left, top), word, ink, font)
            if class_id is not None:
                pen.line((left, top + 16, end, top + 16), ink, 2)
            left = end + 5
        top += _LINE
    return strip


def _frame(clip: dict, t: int, class_names: Sequence[str]) -> Image.Image:
    frame = Image.fromarray(np.asarray(clip["frames"][t]))
    scale = FRAME_HEIGHT / frame.height
    frame = frame.resize((max(1, min(1000, round(frame.width * scale))), FRAME_HEIGHT))
    pen = ImageDraw.Draw(frame)
    size = np.array([frame.width, frame.height] * 2)
    scores, classes = clip["scores"][t], clip["classes"][t]
    best_first = [k for k in np.argsort(-scores, kind="stable") if classes[k] >= 0]
    corners = {k: (np.asarray(clip["boxes"][t][k]) * size).tolist() for k in best_first}
    for k in reversed(best_first):  # the most confident on top
        x1, y1, x2, y2 = corners[k]
        ink = colour(int(classes[k]))
        pen.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=ink, width=2)
    # Draw labels after all boxes, so that no line crosses a label.
    font, taken = _font(10), []
    for k in best_first:
        class_id = int(classes[k])
        name = class_names[class_id] if class_id < len(class_names) else str(class_id)
        label = f"{name} {scores[k]:.2f}"
        width, height = int(pen.textlength(label, font)) + 4, 13
        x, y = _free_place((width, height), corners[k], frame.size, taken)
        taken.append((x, y, x + width, y + height))
        pen.rectangle((x, y, x + width - 1, y + height - 1), fill=colour(class_id))
        pen.text((x + 2, y), label, "white", font)
    return frame


def _free_place(label, box, frame, taken) -> tuple[int, int]:
    """Return a position for a label that covers no other: at its box's top, above, or below."""
    (width, height), (x1, y1, _, y2) = label, box
    x = int(max(0, min(x1, frame[0] - width)))
    steps = range(0, frame[1], height)
    for top in (
        y1,
        y1 - height,
        y2 - height,
        y2,
        *(y1 + s for s in steps),
        *(y1 - s for s in steps),
    ):
        y = int(top)
        free = all(
            x >= right or x + width <= left or y >= bottom or y + height <= high
            for left, high, right, bottom in taken
        )
        if free and 0 <= y <= frame[1] - height:
            return x, y
    return x, int(max(0, min(y1, frame[1] - height)))


def _lines(clip: dict, nouns, names: dict[str, int], width: int):
    """Return the texts as lines of (word, class or None), wrapped to the width."""
    lines = []
    for j, text in enumerate(clip["texts"][:TEXTS]):
        marks = {n.lower(): names[c] for n, c in matched(nouns[j], list(names)).items()}
        answers = clip.get("answers") or ()
        if len(answers) == len(clip["texts"]):
            text = f"{text} — {answers[j]}"
        bullet = "•"
        for part in textwrap.wrap(textwrap.shorten(text, 600), width // 9) or [""]:
            words = [
                (w, marks.get(w.lower().strip(".,;:!?\"'()"))) for w in _in_order(part.split())
            ]
            lines.append([(bullet, None), *words])
            bullet = " "
    if len(clip["texts"]) > TEXTS:
        lines.append([(f"… and {len(clip['texts']) - TEXTS} more", None)])
    return lines


def _in_order(words: Sequence[str]) -> list[str]:
    """Return words in visual order, left to right, even if some are written right to left."""
    runs = [
        (back, list(run)[:: -1 if back else 1])
        for back, run in itertools.groupby(words, _right_to_left)
    ]
    ordered = runs[::-1] if runs and runs[0][0] else runs
    return [word for _, run in ordered for word in run]


def _right_to_left(word: str) -> bool:
    return any(unicodedata.bidirectional(c) in ("R", "AL") for c in word)
