"""Match detections to the sampled frames of a clip; `detections.formats` reads the files.

If the detections have times, each sampled frame takes the ones nearest in time. Otherwise there
must be as many frames with detections as sampled frames, or the frame numbers must be indices of
the video.

T sampled frames, K objects per frame.
"""

import bisect
import dataclasses
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from stoa_jax import files
from stoa_jax.data.detections.formats import (
    MAX_LINE,
    Frame,
    LineError,
    bare,
    parse_video,
    parser_of,
    video_of,
)
from stoa_jax.data.sources.entries import Skipped, clean
from stoa_jax.data.video import ReadInfo, VideoError
from stoa_jax.errors import UserError

SAME_IOU = 0.9  # boxes of one class with a higher IoU are one object
TIME_TOLERANCE = 0.5  # seconds, as a minimum
_MAX_PROBLEMS = 1000  # reported one by one; the rest are counted
_CACHE_FROM = 16 * 2**20  # bytes; the index of a larger file is stored beside it
_CACHE_VERSION = 1
_ROW = np.dtype([("key", "<u8"), ("offset", "<i8"), ("line", "<i8")])


class Detections:
    """Random access to the detections of each video."""

    def __init__(self, path: Path, rows: np.ndarray, class_names, problems, parse):
        self.path, self._rows, self._parse = path, rows, parse
        self.class_names: tuple[str, ...] = tuple(class_names)
        self.problems: list[Skipped] = list(problems)
        self._ids = {name: i for i, name in enumerate(self.class_names)}

    def __contains__(self, video: str) -> bool:
        return len(self._find(video)) > 0

    def __len__(self) -> int:
        """Number of videos with detections."""
        return len(np.unique(self._rows["key"]))

    def _find(self, video: str) -> np.ndarray:
        """Return the rows of a video: by its id, by the id without times, or by its file name."""
        whole = bare(video)
        untimed = re.sub(r"@[\d.e+-]*$", "", whole)
        for name in dict.fromkeys((whole, untimed, untimed.rpartition("/")[2])):
            key = _hash(name)
            first, last = np.searchsorted(self._rows["key"], [key, key + np.uint64(1)])
            if last > first:
                return self._rows[first:last]
        return self._rows[:0]

    def frames(self, video: str) -> list[Frame]:
        """Return all frames of a video with detections, in order; empty if the file has none."""
        found: list[Frame] = []
        for row in self._find(video):
            place = f"{self.path}:{row['line']}"
            try:
                found += self._parse(int(row["offset"]), int(row["line"]))
            except (LineError, UserError) as error:
                raise VideoError(f"{place}: {error}") from None
        found.sort(key=lambda f: (f.number, f.line))
        for one, two in itertools.pairwise(found):
            if one.number == two.number:
                raise VideoError(
                    f"{self.path}:{two.line}: frame {two.number} of {video} is also on line "
                    f"{one.line}; keep one"
                )
        return found

    def objects(
        self, video: str, info: ReadInfo, count: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
        """Return boxes [T, K, 4] in [0, 1], classes [T, K] (-1: none), scores [T, K], best first.

        The fourth value holds notes about boxes that are completely outside the sampled frames.
        """
        chosen = align(self.frames(video), info, f"{self.path}: {video}")
        self._refuse_other_size(chosen, info, video)
        boxes = np.zeros((len(chosen), count, 4), np.float32)
        classes = np.full((len(chosen), count), -1, np.int32)
        scores = np.zeros((len(chosen), count), np.float32)
        seen = lost = 0
        for t, frame in enumerate(chosen):
            if frame is None:
                continue
            unit = _unit(frame, info)
            seen += len(unit)
            lost += int(((unit[:, :2] >= 1) | (unit[:, 2:] <= 0)).any(1).sum())
            unit = np.clip(unit, 0, 1)
            ids = np.array([self._ids.get(name, -1) for name in frame.classes], np.int32)
            keep = distinct(unit, ids, frame.scores, count)
            n = len(keep)
            boxes[t, :n], classes[t, :n] = unit[keep], ids[keep]
            scores[t, :n] = frame.scores[keep]
        words = (
            f"{lost} of {seen} boxes of the sampled frames lie outside the "
            f"{info.width}x{info.height} picture; left out"
        )
        return boxes, classes, scores, [words] if lost else []

    def _refuse_other_size(self, chosen, info: ReadInfo, video: str) -> None:
        """Raise UserError if boxes refer to another image size; clipping them would hide that."""
        unit = [_unit(f, info) for f in {id(f): f for f in chosen if f is not None}.values()]
        unit = np.concatenate([*unit, np.zeros((0, 4))])
        if len(unit) and all(f is None or f.size is None for f in chosen):
            if max(unit[:, 2].max() * info.width, unit[:, 3].max() * info.height) <= 1.01:
                raise VideoError(
                    f"{self.path}: {video}: its boxes look like fractions, not pixels; "
                    "write width 1 and height 1 into the file"
                )
        outside = ((unit[:, :2] + unit[:, 2:]) / 2 > 1).any(1) | (unit[:, 2:] < 0).any(1)
        if len(unit) and outside.mean() > 0.5:
            x, y = unit[:, 2].max() * info.width, unit[:, 3].max() * info.height
            raise VideoError(
                f"{self.path}: {video}: {outside.sum()} of {len(unit)} boxes lie outside the "
                f"{info.width}x{info.height} picture (they reach to {x:.0f}, {y:.0f}); were they "
                "found in pictures of another size? Then write its width and height into the file"
            )


def align(frames: Sequence[Frame], info: ReadInfo, place: str) -> list[Frame | None]:
    """Return for each of T sampled frames the detections that belong to it, or None."""
    wanted = len(info.times)
    if not frames:
        return [None] * wanted
    timed = [(f.time, f) for f in frames if f.time is not None]
    if len(timed) == len(frames):
        timed.sort(key=lambda pair: pair[0])
        times, frames = [time for time, _ in timed], [f for _, f in timed]
        gaps = sorted(b - a for a, b in itertools.pairwise(times))
        reach = max(TIME_TOLERANCE, gaps[len(gaps) // 2] if gaps else 0)
        nearest = [_nearest(times, t) for t in info.times]
        chosen = [
            frames[i] if abs(times[i] - t) <= reach else None
            for i, t in zip(nearest, info.times, strict=True)
        ]
        if not any(chosen):
            raise VideoError(
                f"{place}: has detections from {times[0]:.2f} to {times[-1]:.2f} s, none near the "
                f"sampled frames from {info.times[0]:.2f} to {info.times[-1]:.2f} s"
            )
        return chosen
    if len(frames) == wanted:
        return list(frames)
    numbers = [f.number for f in frames]
    consecutive = numbers[-1] - numbers[0] + 1 == len(numbers)
    every_frame = len(numbers) >= info.video.frames
    if numbers[-1] <= info.video.frames and (every_frame or not consecutive):
        return [frames[_nearest(numbers, i)] for i in info.indices]
    raise VideoError(
        f"{place}: has detections of {len(frames)} frames where {wanted} are sampled; give each a "
        "time, or detect in the sampled frames"
    )


def _nearest(values: Sequence[float], value: float) -> int:
    i = bisect.bisect_left(values, value)
    near = [j for j in (i - 1, i) if 0 <= j < len(values)]
    return min(near, key=lambda j: abs(values[j] - value))


def _unit(frame: Frame, info: ReadInfo) -> np.ndarray:
    width, height = frame.size or (info.width, info.height)
    return frame.boxes / np.array([width, height, width, height], np.float64)


def distinct(boxes: np.ndarray, classes: np.ndarray, scores: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of the `count` most confident objects, without near duplicates.

    Only the best of nearly equal boxes of a class is kept. Boxes [n, 4] without area are left out.
    """
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    keep: list[int] = []
    for i in np.argsort(-scores, kind="stable"):
        if len(keep) == count:
            break
        if areas[i] <= 0 or classes[i] < 0:
            continue
        rivals = [j for j in keep if classes[j] == classes[i]]
        if rivals:
            low = np.maximum(boxes[i, :2], boxes[rivals, :2])
            high = np.minimum(boxes[i, 2:], boxes[rivals, 2:])
            shared = np.prod(np.maximum(high - low, 0), axis=1)
            if (shared > SAME_IOU * (areas[i] + areas[rivals] - shared)).any():
                continue
        keep.append(int(i))
    return np.array(keep, np.int64)


# --- reading -------------------------------------------------------------------------------------


def open_detections(path: str | os.PathLike[str]) -> Detections:
    """Open detections in any of the formats."""
    path = Path(path)
    if path.is_dir():
        return _open_directory(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file or directory of detections")
    parser = parser_of(path)
    if parser is None:  # the JSON of a single video
        return _open_files(path, [path])
    index = _cached(path) or _build_index(path, parser)
    rows, class_names, problems = index
    if not len(rows):
        first = f"; the first problem: {problems[0]}" if problems else ""
        raise UserError(f"{path}: no line with detections{first}")

    return Detections(path, rows, class_names, problems, _Lines(path, parser))


@dataclasses.dataclass
class _Lines:
    """Parse (offset, line) -> frames from a file of lines."""

    path: Path
    parser: Callable[[bytes, int], list[Frame]]

    def __call__(self, offset: int, line: int) -> list[Frame]:
        with open(self.path, "rb") as file:
            file.seek(offset)
            return self.parser(file.readline(MAX_LINE), line)


@dataclasses.dataclass
class _Videos:
    """Parse (index in the list, _) -> frames from one file per video."""

    paths: Sequence[Path]

    def __call__(self, place: int, line: int) -> list[Frame]:
        return parse_video(self.paths[place])


def _build_index(path: Path, parser):
    """Scan all lines: where those of each video are, the classes, and the problems."""
    rows, problems, names = [], _Problems(path), set()
    with open(path, "rb") as file:
        offset, line = 0, 0
        while data := file.readline(MAX_LINE):
            line += 1
            start, offset = offset, offset + len(data)
            if not data.strip() or (line == 1 and getattr(parser, "is_header", _no)(data)):
                continue
            try:
                frames = parser(data, line)
            except (LineError, UserError) as error:
                problems.add("", str(error), line)
                continue
            for video in {f.video: None for f in frames}:
                rows.append((_hash(bare(video)), start, line))
            for frame in frames:
                names.update(frame.classes)
                if frame.dropped:
                    problems.add(frame.video, frame.dropped, line)
    table = np.array(rows, _ROW)
    table = table[np.argsort(table["key"], kind="stable")]
    index = table, sorted(names), problems.named()
    _keep(path, *index)
    return index


def _no(data: bytes) -> bool:
    return False


class _Problems:
    """Problems by line; the first thousand are kept in full."""

    def __init__(self, path: Path):
        self.path, self.rows, self.more = path, [], 0

    def add(self, video: str, error: str, line: int, file: Path | None = None) -> None:
        if len(self.rows) < _MAX_PROBLEMS:
            self.rows.append(Skipped(clean(video), error, str(file or self.path), line))
        else:
            self.more += 1

    def named(self) -> list[Skipped]:
        more = f"{self.more} more lines with something wrong"
        return self.rows + ([Skipped("", more, str(self.path), 0)] if self.more else [])


def _cache(path: Path) -> tuple[Path, Path, list[int]]:
    status = path.stat()
    stamp = [_CACHE_VERSION, status.st_size, status.st_mtime_ns]
    directory = path.with_name(path.name + ".index")
    return directory / "rows.npy", directory / "index.json", stamp


def _cached(path: Path):
    rows_path, meta_path, stamp = _cache(path)
    try:
        meta = json.loads(meta_path.read_text())
        if meta["stamp"] != stamp:
            return None
        rows = np.load(rows_path, mmap_mode="r", allow_pickle=False)
        if rows.dtype != _ROW or len(rows) != meta["rows"]:
            return None
        return rows, meta["classes"], [Skipped(*p) for p in meta["problems"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(path: Path, rows: np.ndarray, classes: list[str], problems: list[Skipped]) -> None:
    """Store the index of a large file beside it, if the directory is writable."""
    rows_path, meta_path, stamp = _cache(path)
    if stamp[1] < _CACHE_FROM:
        return
    meta = {
        "stamp": stamp,
        "rows": len(rows),
        "classes": classes,
        "problems": [dataclasses.astuple(p) for p in problems],
    }
    try:
        for target, write in (
            (rows_path, lambda f: np.save(f, rows)),
            (meta_path, lambda f: f.write(json.dumps(meta).encode())),
        ):
            with files.atomic(target) as temporary, open(temporary, "wb") as file:
                write(file)
    except OSError:
        pass  # read-only: every process scans the file once


def _open_directory(directory: Path) -> Detections:
    paths = sorted(p for p in directory.rglob("*.json") if p.is_file())
    if not paths:
        raise UserError(f"{directory}: no .json file of a video in it")
    return _open_files(directory, paths)


def _open_files(root: Path, paths: Sequence[Path]) -> Detections:
    """Open a directory of JSON files, one per video: read once for classes, again on loading."""
    problems, names, rows = _Problems(root), set(), []
    for i, path in enumerate(paths):
        try:
            frames = parse_video(path)
        except (LineError, UserError, OSError) as error:
            problems.add(video_of(path), str(error), 0, path)
            continue
        rows.append((_hash(video_of(path)), i, 0))
        for frame in frames:
            names.update(frame.classes)
            if frame.dropped:
                problems.add(frame.video, f"frame {frame.number}: {frame.dropped}", 0, path)
    if not rows:
        raise UserError(f"{root}: no file with detections; the first: {problems.rows[0]}")
    table = np.array(rows, _ROW)
    table = table[np.argsort(table["key"], kind="stable")]
    return Detections(root, table, sorted(names), problems.named(), _Videos(paths))


def _hash(name: str) -> np.uint64:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    # Keep the top bit free so that key + 1 cannot wrap around.
    return np.uint64(int.from_bytes(digest, "little") >> 1)
