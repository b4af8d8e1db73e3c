"""Images of an explanation: a film strip as PNG, or an animated WebP or MP4."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np

from stoa_jax import film
from stoa_jax.errors import InputError, UserError
from stoa_jax.files import atomic
from stoa_jax.inference.matched import Action, Trajectory

HEIGHT = 200  # pixels of a frame in the strip
LINE = 22  # pixels of a line of text
INK, PAPER, SOFT = (30, 30, 30), (255, 255, 255), (120, 120, 120)
FRAMES_PER_SECOND = 2  # in an animation


class Explanation(Protocol):
    """The parts of `stoa_jax.inference.explain.Explanation` that are drawn."""

    @property
    def text(self) -> str:
        """The text that was explained."""
        ...

    @property
    def times(self) -> np.ndarray:
        """Times of the frames [T]."""
        ...

    @property
    def trajectories(self) -> Sequence[Trajectory]:
        """Trajectories with their boxes and words."""
        ...

    @property
    def actions(self) -> Sequence[Action]:
        """Actions with their attention and words."""
        ...

    @property
    def probability(self) -> float:
        """Match probability of video and text."""
        ...

    @property
    def frames(self) -> list[np.ndarray]:
        """Decoded frames."""
        ...

    @property
    def crop(self) -> np.ndarray:
        """The part of a frame that the model sees [4]."""
        ...


def draw(explanation: Explanation, path: Path) -> None:
    """Write the image or animation that the suffix of `path` names, atomically."""
    writers = {".png": _png, ".webp": _webp, ".mp4": _mp4}
    if path.suffix.lower() not in writers:
        raise InputError(f"draw: {path} ends in {path.suffix!r}; use {', '.join(writers)}")
    try:
        with atomic(path) as temporary:
            writers[path.suffix.lower()](explanation, temporary)
    except OSError as error:
        raise UserError(f"draw: {path} cannot be written ({error.strerror or error})") from None


def strip(explanation: Explanation) -> np.ndarray:
    """Return the film strip: frames with boxes, words, and a row of attention for each action."""
    frames = explanation.frames
    rows = [film.strip(frames, *_boxes(explanation), height=HEIGHT)]
    width = rows[0].shape[1]
    rows.append(_times(explanation, width))
    rows.append(_legend(explanation, width))
    for i, action in enumerate(explanation.actions):
        rows.append(_line([(_action_words(i, action), INK)], width))
        attention = _over_frame(explanation, action)
        rows.append(film.attention_strip(frames, attention, height=HEIGHT // 2))
    width = max(row.shape[1] for row in rows)
    padded = [_padded(row, width) for row in rows]
    return np.concatenate(padded)


def _boxes(explanation: Explanation) -> tuple[np.ndarray, np.ndarray]:
    found, t = explanation.trajectories, len(explanation.frames)
    if not found:
        return np.zeros((0, t, 4), np.float32), np.zeros((0, t), bool)
    return np.stack([x.boxes for x in found]), np.stack([x.shown for x in found])


def _over_frame(explanation: Explanation, action: Action) -> np.ndarray:
    """Return attention over whole frames [T, h, w]; it is 0 outside the model's crop."""
    height, width = explanation.frames[0].shape[:2]
    x1, y1, x2, y2 = np.round(explanation.crop * [width, height, width, height]).astype(int)
    out = np.zeros((len(action.attention), height, width), np.float32)
    for picture, weights in zip(out, action.attention, strict=True):
        picture[y1:y2, x1:x2] = cv2.resize(
            weights.astype(np.float32), (x2 - x1, y2 - y1), interpolation=cv2.INTER_NEAREST
        )
    return out


def _words(word: str | None, score: float) -> str:
    return f"{'no word' if word is None else word} {score:.2f}"


def _action_words(i: int, action: Action) -> str:
    return f"action {i + 1}: {_words(action.word, action.word_score)}"


def _times(explanation: Explanation, width: int) -> np.ndarray:
    row = np.full((LINE, width, 3), PAPER, np.uint8)
    step = width / len(explanation.times)
    for i, time in enumerate(explanation.times):
        _write(row, f"{time:.2f}", round(i * step), SOFT)
    return row


def _legend(explanation: Explanation, width: int) -> np.ndarray:
    parts = [(f"{explanation.text}  ({explanation.probability:.2f})", INK)]
    lines = [_line(parts, width)]
    for i, t in enumerate(explanation.trajectories):
        text = f"{t.name} {t.score:.2f} -> {_words(t.word, t.word_score)}"
        lines.append(_line([("# ", film.colour(i)), (text, INK)], width))
    return np.concatenate(lines)


def _line(parts: list[tuple[str, tuple[int, int, int]]], width: int) -> np.ndarray:
    row = np.full((LINE, max(width, 320), 3), PAPER, np.uint8)
    x = 4
    for text, rgb in parts:
        if text == "# ":
            cv2.rectangle(row, (x, 5), (x + 12, LINE - 5), rgb, -1)
            x += 18
        else:
            x = _write(row, text, x, rgb)
    return row


def _write(row: np.ndarray, text: str, x: int, rgb: tuple[int, int, int]) -> int:
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.fromarray(row)
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(14)
    pen.text((x, 2), text, fill=rgb, font=font)
    row[...] = np.asarray(picture)
    return x + round(pen.textlength(text, font=font)) + 6


def _padded(row: np.ndarray, width: int) -> np.ndarray:
    out = np.full((row.shape[0], width, 3), PAPER, np.uint8)
    out[:, : row.shape[1]] = row
    return out


def _animation(explanation: Explanation) -> list[np.ndarray]:
    """Return one image per frame: boxes on the left, mean attention on the right, words below."""
    boxes, shown = _boxes(explanation)
    pictures = []
    for t, frame in enumerate(explanation.frames):
        left = film.strip([frame], boxes[:, t : t + 1], shown[:, t : t + 1], height=HEIGHT * 2)
        sides = [left]
        if explanation.actions:
            mean = np.mean([_over_frame(explanation, a)[t] for a in explanation.actions], 0)
            sides.append(film.attention_strip([frame], mean[None], height=HEIGHT * 2))
        row = np.concatenate(sides, 1)
        words = _legend(explanation, row.shape[1])
        row, words = (_padded(x, max(row.shape[1], words.shape[1])) for x in (row, words))
        picture = np.concatenate([row, words])
        # Video codecs require even sides.
        even = picture.shape[0] % 2, picture.shape[1] % 2
        pictures.append(np.pad(picture, ((0, even[0]), (0, even[1]), (0, 0)), mode="edge"))
    return pictures


def _png(explanation: Explanation, path: Path) -> None:
    from PIL import Image

    Image.fromarray(strip(explanation)).save(path, format="PNG")


def _webp(explanation: Explanation, path: Path) -> None:
    from PIL import Image

    first, *others = (Image.fromarray(picture) for picture in _animation(explanation))
    first.save(
        path,
        format="WebP",
        save_all=True,
        append_images=others,
        duration=1000 // FRAMES_PER_SECOND,
        loop=0,
        quality=85,
    )


def _mp4(explanation: Explanation, path: Path) -> None:
    import av

    pictures = _animation(explanation)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("h264", rate=Fraction(FRAMES_PER_SECOND))
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
