"""Parsers of detection files in four formats, from a line, or from one video's JSON, to frames.

The formats are recognized by content:

- VinVL `predictions.tsv`: an image key, a tab, {"objects": [{"rect", "class", "conf"}]}. The last
  number of the key is the frame, the text before it the video: `video12_3.jpg`, `video12/003`.
- VinVL, a directory with one `<video>.json` per video: a list of frames with "objects".
- bottom-up attention: a TSV of image_id, image_w, image_h, num_boxes, boxes, features. Without the
  columns `objects_id` and `objects_conf` every box has the class "object".
- our JSON lines, one per frame:
  {"video": id, "frame": i, "time": s, "width": w, "height": h,
   "objects": [{"box": [x1, y1, x2, y2], "class": name, "score": p}]}
  "time" (seconds from the first frame), "width" and "height" are optional. The size is that of the
  image that the boxes refer to; by default that of the upright video. A line may also hold a whole
  video: {"video": id, "frames": [...]}.
"""

import base64
import binascii
import collections
import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from stoa_jax.data.sources.entries import clean, shown
from stoa_jax.data.sources.files import VIDEO_SUFFIXES, parse_json
from stoa_jax.errors import UserError

UNNAMED = "object"  # class of boxes whose file names none
MAX_LINE = 256 * 2**20
_FRAME_OF_KEY = re.compile(r"(?P<video>.+?)[/_\-.\[](?:frame[_-]?)?(?P<frame>\d{1,9})\]?")


@dataclasses.dataclass(frozen=True)
class Frame:
    """Detections of one frame as the file gives them."""

    video: str
    number: int
    time: float | None  # seconds
    size: tuple[float, float] | None  # width and height that the boxes refer to
    boxes: np.ndarray  # [n, 4] xyxy
    classes: list[str]  # n
    scores: np.ndarray  # [n]
    line: int
    dropped: str = ""  # why objects were dropped


class LineError(Exception):
    """The reason why a line holds no detections."""


def parser_of(path: Path) -> Callable[[bytes, int], list[Frame]] | None:
    """Return the parser of a file's lines, or None for the JSON of a single video."""
    with open(path, "rb") as file:
        head = file.readline(MAX_LINE).removeprefix(b"\xef\xbb\xbf")
        while head and not head.strip():
            head = file.readline(MAX_LINE)
    if not head:
        raise UserError(f"{path}: empty")
    cells = head.rstrip(b"\r\n").split(b"\t")
    if cells[0] in (b"image_id", b"img_id"):
        return _BottomUp(tuple(c.decode("latin-1") for c in cells))
    if len(cells) == 6 and all(c.strip().isdigit() for c in cells[1:4]):
        return _BottomUp(_BottomUp.COLUMNS)
    if len(cells) >= 2 and cells[1][:1] in (b"{", b"["):
        return _parse_vinvl
    if head.lstrip()[:1] == b"{":
        try:
            value = json.loads(head)
        except (ValueError, RecursionError):
            value = {"video": ""} if b'"video"' in head else {}
        if "video" in value or "video_id" in value:
            return _parse_lines
    if head.lstrip()[:1] in (b"{", b"["):
        return None
    raise UserError(
        f"{path}:1: detections in an unknown format (VinVL TSV or JSON, bottom-up-attention "
        "TSV, JSON lines with video, frame and objects)"
    )


def video_of(path: Path) -> str:
    """Return the video's name for `video12.json`, or for `name_[0]_[31].json` with a part of it."""
    return bare(re.sub(r"(_\[\d+\])+$", "", path.stem))


def parse_video(path: Path) -> list[Frame]:
    """Return all frames of one video's JSON file."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise LineError("not UTF-8") from None
    value = parse_json(text, str(path))
    frames = value.get("frames", value.get("predictions")) if isinstance(value, dict) else value
    if not isinstance(frames, list):
        raise LineError("holds no list of frames")
    return [_frame(video_of(path), i, row, 0) for i, row in enumerate(frames)]


def _parse_lines(data: bytes, line: int) -> list[Frame]:
    value = _json(data, line)
    if not isinstance(value, dict):
        raise LineError(f"{shown(value)} is not a JSON object")
    video = value.get("video", value.get("video_id"))
    if not isinstance(video, str) or not video:
        raise LineError(f"field 'video': {shown(video)} names no video")
    if "frames" not in value:
        number = value.get("frame")
        if number is None and "time" in value:
            number = round(1000 * abs(_number(value["time"], "time")))  # sort key
        return [_frame(video, _whole(number, "frame"), value, line)]
    frames = value["frames"]
    if not isinstance(frames, list):
        raise LineError(f"field 'frames': {shown(frames)} is not a list")
    shared = {k: value[k] for k in ("width", "height") if k in value}
    return [
        _frame(video, i, shared | row if isinstance(row, dict) else row, line)
        for i, row in enumerate(frames)
    ]


def _parse_vinvl(data: bytes, line: int) -> list[Frame]:
    cells = data.rstrip(b"\r\n").split(b"\t")
    if len(cells) < 2:
        raise LineError("one field where an image key and JSON are expected, with a tab between")
    video, number = split_key(_utf8(cells[0]).removeprefix("\ufeff"))
    return [_frame(video, number, _json(cells[1], line), line)]


class _BottomUp:
    """Parser of the lines of a bottom-up-attention TSV; it does not decode the features."""

    COLUMNS = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")

    def __init__(self, columns: Sequence[str]):
        self.columns = ["image_id" if c == "img_id" else c for c in columns]
        self.columns = [c.replace("img_", "image_") for c in self.columns]
        missing = [c for c in self.COLUMNS[:-1] if c not in self.columns]
        if missing:
            raise UserError(f"line 1: no column {missing[0]!r} in the header of detections")

    def is_header(self, data: bytes) -> bool:
        """Return whether a line holds the column names."""
        return data.removeprefix(b"\xef\xbb\xbf")[:9] in (b"image_id\t", b"img_id\tim")

    def __call__(self, data: bytes, line: int) -> list[Frame]:
        cells = data.rstrip(b"\r\n").split(b"\t")
        if len(cells) != len(self.columns):
            raise LineError(f"{len(cells)} fields, not {len(self.columns)}")
        row = dict(zip(self.columns, cells, strict=True))
        video, number = split_key(_utf8(row["image_id"]))
        count = _whole(row["num_boxes"], "num_boxes")
        size = (_length(row["image_w"], "image_w"), _length(row["image_h"], "image_h"))
        boxes = _floats(row["boxes"], "boxes", "<f4", count * 4).reshape(count, 4)
        classes, scores = [UNNAMED] * count, np.ones(count)
        if "objects_id" in row:
            classes = [str(c) for c in _floats(row["objects_id"], "objects_id", "<i8", count)]
        if "objects_conf" in row:
            scores = _floats(row["objects_conf"], "objects_conf", "<f4", count)
        return [_checked(video, number, None, size, boxes, classes, scores, line, {})]


def _floats(cell: bytes, name: str, dtype: str, count: int) -> np.ndarray:
    try:
        data = base64.b64decode(cell, validate=True)
    except (binascii.Error, ValueError):
        raise LineError(f"field {name!r}: not base64") from None
    width = np.dtype(dtype).itemsize
    if len(data) != count * width:
        raise LineError(f"field {name!r}: {len(data)} bytes instead of {count * width}")
    return np.frombuffer(data, dtype)


def split_key(key: str) -> tuple[str, int]:
    """Return the video and the frame number that an image key means."""
    bare = re.sub(r"\.(jpe?g|png|bmp|webp)$", "", key.strip(), flags=re.IGNORECASE)
    if not bare:
        raise LineError("the image key is empty")
    match = _FRAME_OF_KEY.fullmatch(bare)
    return (match["video"], int(match["frame"])) if match else (bare, 0)


def _frame(video: str, number: int, row: object, line: int) -> Frame:
    """Parse a frame from JSON: a list of objects, or an object with such a list."""
    if row is None:
        row = []
    details = row if isinstance(row, dict) else {}
    objects = details.get("objects") if isinstance(row, dict) else row
    if not isinstance(objects, list):
        raise LineError(f"field 'objects': {shown(objects)} is not a list")
    boxes, classes, scores, wrong = [], [], [], collections.Counter()
    for entry in objects:
        try:
            box, name, score = _object(entry)
        except (TypeError, ValueError, KeyError, OverflowError):
            wrong["without a box of four numbers, a class and a score"] += 1
            continue
        boxes.append(box)
        classes.append(name)
        scores.append(score)
    time = details.get("time")
    time = None if time is None else _number(time, "time")
    width = details.get("width", details.get("image_w"))
    height = details.get("height", details.get("image_h"))
    size = None
    if width is not None or height is not None:
        size = _length(width, "width"), _length(height, "height")
    boxes = np.array(boxes, np.float64).reshape(-1, 4)
    return _checked(video, number, time, size, boxes, classes, np.array(scores), line, wrong)


def _object(entry: dict) -> tuple[list[float], str, float]:
    box = entry["box"] if "box" in entry else entry["rect"]
    name, score = entry["class"], entry["score"] if "score" in entry else entry["conf"]
    if not isinstance(box, list) or len(box) != 4 or isinstance(name, bool):
        raise ValueError
    name = clean(str(name)) if isinstance(name, str | int) else ""
    if not name:
        raise ValueError
    return [_plain(x) for x in box], name, _plain(score)


def _plain(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    return float(value)


def _checked(video, number, time, size, boxes, classes, scores, line, wrong) -> Frame:
    """Return a frame without its invalid objects, with a note about them."""
    wrong = collections.Counter(wrong)
    boxes, scores = np.asarray(boxes, np.float64), np.asarray(scores, np.float64)
    finite = np.isfinite(boxes).all(1) & np.isfinite(scores)
    with np.errstate(invalid="ignore"):
        area = (boxes[:, 2:] > boxes[:, :2]).all(1)
        inside = np.ones(len(boxes), bool)
        if size is not None:
            inside = (boxes[:, 2:] > 0).all(1) & (boxes[:, :2] < size).all(1)
    wrong["not finite"] += int((~finite).sum())
    wrong["inverted or without area"] += int((finite & ~area).sum())
    wrong["outside the image"] += int((finite & area & ~inside).sum())
    keep = finite & area & inside
    words = ", ".join(f"{n} {what}" for what, n in wrong.items() if n)
    return Frame(
        video=bare(video),
        number=number,
        time=time,
        size=size,
        boxes=boxes[keep],
        classes=[c for c, k in zip(classes, keep, strict=True) if k],
        scores=np.clip(scores[keep], 0, 1).astype(np.float32),
        line=line,
        dropped=f"objects dropped: {words}" if words else "",
    )


def bare(video: str) -> str:
    """Return a video's name without a video suffix."""
    name = video.strip().replace("\\", "/").removeprefix("./")
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and stem and f".{suffix.lower()}" in VIDEO_SUFFIXES else name


def _utf8(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise LineError("the image key is not UTF-8") from None


def _json(data: bytes, line: int) -> object:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise LineError("not UTF-8") from None
    except json.JSONDecodeError as error:
        raise LineError(f"not JSON at column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise LineError(f"unreadable JSON: {error}") from None


def _whole(value: object, name: str) -> int:
    """Return a count or frame number from JSON or from a table cell."""
    if isinstance(value, bytes):
        value = int(value) if value.strip().isdigit() and len(value) < 12 else value
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**40:
        raise LineError(f"field {name!r}: {shown(value)} is not a number from 0")
    return value


def _number(value: object, name: str) -> float:
    try:
        number = _plain(float(value) if isinstance(value, bytes) else value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise LineError(f"field {name!r}: {shown(value)} is not a number")
    return number


def _length(value: object, name: str) -> float:
    number = _number(value, name)
    if number <= 0:
        raise LineError(f"field {name!r}: {shown(value)} is not a size")
    return number


def frames_of(path: str | os.PathLike[str]) -> Iterator[Frame]:
    """Yield all frames of a file of JSON lines; a torn last line ends it."""
    with open(path, "rb") as file:
        for line, data in enumerate(file, 1):
            if data.strip():
                yield from _parse_lines(data, line)
