"""Your own videos: a directory with `captions.csv` or `captions.jsonl` and videos at any depth.

The columns are `video,caption` and optionally `split`, `start` and `end` (seconds); other columns
are ignored. `video` is a path under the directory, a file name, or a name without its suffix.
Several rows of a video are several captions. Rows without a split belong to "train".
"""

import re
from collections import defaultdict
from pathlib import Path, PurePosixPath

from stoa_jax.data.sources.dataset import DataSet
from stoa_jax.data.sources.entries import Entry, RowError, SkippedRows, caption, clean, shown
from stoa_jax.data.sources.files import (
    VIDEO_SUFFIXES,
    Files,
    read_csv,
    read_json_lines,
    seconds,
)
from stoa_jax.errors import UserError

# Common spellings -> the name used in this project.
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validate": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
_OWN_SPLIT = re.compile(r"[a-z][a-z0-9_]{0,40}")


def read_captions(files: Files, skipped: SkippedRows) -> dict[str, list[Entry]]:
    """Return the splits of a directory of videos."""
    table, lines = files.root / "captions.csv", files.root / "captions.jsonl"
    if table.exists() and lines.exists():
        raise UserError(f"{files.root}: both captions.csv and captions.jsonl; keep one")
    if not table.exists() and not lines.exists():
        raise UserError(
            f"{files.root}: no captions.csv (video,caption[,split]) or captions.jsonl in it"
        )
    names = _Names(files)
    if table.exists():
        path, rows = table, read_csv(table, ("video", "caption"), skipped, names.looks_like_one)
    else:
        path, rows = lines, read_json_lines(lines, skipped)

    texts: dict[tuple, list[str]] = defaultdict(list)  # in file order
    for line, row in rows:
        try:
            key = (_split(row.get("split")), *_clip(row, names))
        except RowError as error:
            skipped.add(row.get("video"), error, path, line)
            continue
        written = row.get("caption")
        for text in written if isinstance(written, list) else [written]:
            try:
                texts[key].append(caption(text))
            except RowError as error:
                skipped.add(row.get("video"), error, path, line)
    splits: dict[str, list[Entry]] = defaultdict(list)
    for (split, video, start, end), captions in texts.items():
        if captions:
            video_id = names.identity(video, start, end)
            splits[split].append(Entry(video_id, str(video), captions, (), start, end))
    captioned = {video for _, video, _, _ in texts}
    for video in files.videos():
        if video not in captioned:
            skipped.add(names.identity(video, None, None), "video without a caption", path, 0)
    order = {"train": 0, "validation": 1, "test": 2}
    return {s: splits[s] for s in sorted(splits, key=lambda s: (order.get(s, 3), s))}


def _split(value: object) -> str:
    if value is None or value == "":
        return "train"
    if not isinstance(value, str):
        raise RowError(f"field 'split': {shown(value)} is not a string")
    name = value.strip().lower()
    name = SPLITS.get(name, name) or "train"
    if not _OWN_SPLIT.fullmatch(name):
        raise RowError(
            f"field 'split': {shown(value)} is not a name for a split (letters, digits, _)"
        )
    return name


def _clip(row: dict, names: "_Names") -> tuple[Path, float | None, float | None]:
    video = row.get("video")
    if not isinstance(video, str) or not video.strip():
        raise RowError(f"field 'video': {shown(video)} names no video")
    start, end = seconds(row.get("start"), "start"), seconds(row.get("end"), "end")
    if end is not None and end <= (start or 0.0):
        raise RowError(f"field 'end': {end:g} is not after the start {start or 0.0:g}")
    return names.path(video.strip()), start, end


class _Names:
    """Map from the column `video` to a path, and from a path to a short, unique id."""

    def __init__(self, files: Files):
        self.root = files.root
        self.by_name: dict[str, list[Path]] = defaultdict(list)
        for path in files.videos():
            for name in {path.name, path.stem, self._relative(path), self._bare(path)}:
                self.by_name[name].append(path)

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _bare(self, path: Path) -> str:
        return str(PurePosixPath(self._relative(path)).with_suffix(""))

    def looks_like_one(self, text: str) -> bool:
        """Return whether a cell names a video."""
        return text in self.by_name or PurePosixPath(text).suffix.lower() in VIDEO_SUFFIXES

    def path(self, name: str) -> Path:
        """Return the path that a row means; a missing file is reported when it is loaded."""
        name = name.replace("\\", "/").removeprefix("./")
        exact = self.root / name
        found = self.by_name.get(name, ())
        if exact in found:
            return exact
        if len(found) > 1:
            raise RowError(
                f"field 'video': {shown(name)} may be {found[0]} or {found[1]}; write its path"
            )
        return found[0] if found else exact

    def identity(self, path: Path, start: float | None, end: float | None) -> str:
        """Return the path in the directory, without suffix if that is unique, and the times."""
        try:
            name = self._bare(path)
            if len(self.by_name.get(name, ())) > 1:
                name = self._relative(path)
        except ValueError:  # a path outside the directory, or an invalid one
            name = str(path)
        name = clean(name)  # a directory's name need not be UTF-8
        if start is None and end is None:
            return name
        return f"{name}@{start or 0:g}-{'' if end is None else f'{end:g}'}"


DATA_SETS = (DataSet("folder/captions", read_captions, tasks=("pretrain",)),)
