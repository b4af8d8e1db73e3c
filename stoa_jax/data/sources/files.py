"""Strict readers of annotation files: every error names the file, the line and the field."""

import csv
import functools
import io
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from stoa_jax.data.sources.entries import RowError, SkippedRows, clean, shown
from stoa_jax.errors import UserError

VIDEO_SUFFIXES = frozenset(
    ".3gp .asf .avi .divx .f4v .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .rm "
    ".rmvb .ts .vob .webm .wmv".split()
)


class Files:
    """The files under a directory, found by name at any depth."""

    def __init__(self, root: str | os.PathLike[str]):
        self.root = Path(root)
        if not self.root.is_dir():
            raise UserError(f"{self.root}: no such directory of published files")

    @functools.cached_property
    def _tree(self) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
        names, stems = defaultdict(list), defaultdict(list)
        seen = set()  # linked video directories can form a cycle
        for directory, subdirectories, found in os.walk(self.root, followlinks=True):
            status = os.stat(directory)
            if (status.st_dev, status.st_ino) in seen:
                subdirectories.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            subdirectories.sort()
            for name in sorted(found):
                path = Path(directory, name)
                names[name].append(path)
                if path.suffix.lower() in VIDEO_SUFFIXES:
                    stems[path.stem].append(path)
        return names, stems

    def find(self, *names: str) -> Path | None:
        """Return the first of these names that exists, at the smallest depth, or None."""
        for name in names:
            direct = self.root / name
            if direct.is_file():
                return direct
        for name in names:
            paths = sorted(self._tree[0].get(name, ()), key=lambda p: (len(p.parts), p))
            if len(paths) > 1 and len(paths[0].parts) == len(paths[1].parts):
                raise UserError(f"two files {name}: {paths[0]} and {paths[1]}; keep one")
            if paths:
                return paths[0]
        return None

    def require(self, *names: str) -> Path:
        """Return the file as `find` does, or raise UserError."""
        path = self.find(*names)
        if path is None:
            raise UserError(f"{self.root}: no {' or '.join(names)} in it, at any depth")
        return path

    def videos(self) -> Iterator[Path]:
        """Yield all videos in order of their paths."""
        yield from sorted(p for paths in self._tree[1].values() for p in paths)

    def video(self, stem: str) -> str:
        """Return the path of `<stem>.<any video suffix>`, or that of the missing video.

        A missing video is reported when it is loaded.
        """
        found = _shallowest(self._tree[1].get(stem, ()))
        return str(found or self._video_directory / f"{stem}.mp4")

    @functools.cached_property
    def _video_directory(self) -> Path:
        """The directory of missing videos: that of the other videos, if they are all in one."""
        places = {path.parent for paths in self._tree[1].values() for path in paths}
        return places.pop() if len(places) == 1 else self.root / "videos"

    def named(self, name: str) -> Path | None:
        """Return the file with exactly this name, at any depth."""
        return _shallowest(self._tree[0].get(name, ()))


def _shallowest(paths: Sequence[Path]) -> Path | None:
    # Take the shallowest, then the first by name, to be the same on every machine.
    return min(paths, key=lambda p: (len(p.parts), p), default=None)


def read_text(path: Path) -> str:
    """Read a UTF-8 file, with or without a byte-order mark."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    return decode(data, path)


def decode(data: bytes, path: Path, line: int = 1) -> str:
    """Decode UTF-8, or raise UserError with the line of the first invalid byte."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}: is UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = line + data.count(b"\n", 0, error.start)
        raise UserError(
            f"{path}:{at}: byte 0x{data[error.start]:02x} is not UTF-8; convert the file "
            "(iconv -f WINDOWS-1252 -t UTF-8, if that is what it is)"
        ) from None


def read_json(path: Path, kind: type) -> Any:
    """Read a JSON file whose top level is of `kind` (list or dict)."""
    value = parse_json(read_text(path), str(path))
    if not isinstance(value, kind):
        name = {list: "a list", dict: "an object"}[kind]
        raise UserError(f"{path}: holds {type(value).__name__}, not {name}")
    return value


def parse_json(text: str, place: str, line: int = 1) -> Any:
    """Parse a JSON value, or raise UserError with the position of the fault."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text.rstrip()) - 1 or error.msg.startswith("Unterminated")
        end = " (cut short?)" if cut else ""
        raise UserError(
            f"{place}:{line + error.lineno - 1}: not JSON at column {error.colno}: {error.msg}{end}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}:{line}: unreadable JSON: {error}") from None


def read_json_lines(
    path: Path, skipped: SkippedRows, text: str | None = None
) -> Iterator[tuple[int, dict]]:
    """Yield (line, object) of a JSONL file; lines that are not objects are added to `skipped`."""
    text = read_text(path) if text is None else text
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, str(path), number)
        except UserError as error:
            skipped.add(None, str(error).removeprefix(f"{path}:{number}: "), path, number)
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            skipped.add(None, f"{shown(row)} is not a JSON object", path, number)


def read_rows(path: Path, skipped: SkippedRows) -> Iterator[tuple[int, dict]]:
    """Yield (number, object) of a JSON list of objects or of JSONL; both are published."""
    text = read_text(path)
    if not text.lstrip().startswith("["):
        yield from read_json_lines(path, skipped, text)
        return
    for number, row in enumerate(parse_json(text, str(path)), 1):
        if isinstance(row, dict):
            yield number, row
        else:
            skipped.add(None, f"{shown(row)} is not a JSON object", path, number)


def read_csv(
    path: Path,
    columns: Sequence[str],
    skipped: SkippedRows,
    begins_row: Callable[[str], bool] | None = None,
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line, row) of a CSV file whose header has `columns`, and perhaps others.

    A row with too few or too many fields is added to `skipped`. An unclosed quote would swallow
    rows, so it raises UserError, as does a quoted field of several lines if `begins_row` accepts
    one of them as the start of a row.
    """
    text = read_text(path)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header, first = None, 1
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"{path}:{first}: broken CSV ({error}); a quote inside a quoted field is doubled"
            ) from None
        if row is None:
            break
        line, first = first, reader.line_num + 1
        if not any(row):
            continue
        if header is None:
            header = [name.strip() for name in row]
            missing = [c for c in columns if c not in header]
            if missing:
                raise UserError(
                    f"{path}:{line}: no column {missing[0]!r} in the header "
                    f"({clean(', '.join(header))[:200]})"
                )
            twice = next((c for c in header if c and header.count(c) > 1), None)
            if twice:
                raise UserError(f"{path}:{line}: two columns {twice!r}")
            continue
        _refuse_swallowed(row, len(header), begins_row, path, line)
        if len(row) != len(header):
            skipped.add(
                row[0],
                f"{len(row)} fields, but the header has {len(header)}; quote "
                "fields that contain a comma",
                path,
                line,
            )
            continue
        yield line, dict(zip(header, row, strict=True))
    if header is None:
        raise UserError(f"{path}:1: empty; a header with {', '.join(columns)} is needed")


def _refuse_swallowed(row, width: int, begins_row, path, line: int) -> None:
    if begins_row is None:
        return
    for field in row:
        for offset, part in enumerate(field.splitlines()[1:], 1):
            cells = part.split(",")
            if len(cells) >= width and begins_row(cells[0].strip().strip('"')):
                raise UserError(
                    f"{path}:{line}: a quote opened here runs into line {line + offset}; close it"
                )


def field(row: dict, name: str, kind: type | tuple[type, ...]) -> Any:
    """Return the field `name` of a JSON object, or raise RowError if it is not of `kind`."""
    if name not in row:
        raise RowError(f"no field {name!r}")
    value = row[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(_KIND_NAMES.get(k, k.__name__) for k in kinds)
        raise RowError(f"field {name!r}: {shown(value)} is not {wanted}")
    return value


_KIND_NAMES = {
    str: "a string",
    int: "a whole number",
    list: "a list",
    dict: "an object",
    float: "a number",
}


def seconds(value: object, name: str) -> float | None:
    """Return a time of a row in seconds; None if it is empty."""
    if value is None or value == "":
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise RowError(f"field {name!r}: {shown(value)} is not a number of seconds") from None
    if not 0 <= number < float("inf"):
        raise RowError(f"field {name!r}: {shown(value)} is not a time in a video")
    return number
