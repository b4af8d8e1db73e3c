"""WebVid: `results_2M_{train,val}.csv` and videos at `videos/{page_dir}/{videoid}.mp4`.

The tables have millions of rows. An entry is parsed when it is used and is only an offset until
then, so that every build process holds about twenty bytes per row.
"""

import array
import copy
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from stoa_jax.data.sources.dataset import DataSet
from stoa_jax.data.sources.entries import Entry, RowError, SkippedRows, caption, clean, file_name
from stoa_jax.data.sources.files import Files, decode
from stoa_jax.errors import UserError

COLUMNS = ("videoid", "name", "page_dir")
_MAX_LINES = 50  # in one row; more means an unclosed quote


def read_captions(files: Files, skipped: SkippedRows) -> dict[str, Sequence[Entry]]:
    """Return the train and validation splits, if their files exist."""
    found = {}
    for split, names in {
        "train": ("results_2M_train.csv", "results_10M_train.csv"),
        "validation": ("results_2M_val.csv", "results_10M_val.csv"),
    }.items():
        # Looked up by path: walking over millions of videos would take too long.
        places = [d / n for n in names for d in (files.root, files.root / "annotations")]
        path = next((p for p in places if p.is_file()), None)
        if path is not None:
            found[split] = Rows(path, files.root / "videos", skipped)
    if not found:
        raise UserError(f"{files.root}: no results_2M_train.csv or results_2M_val.csv in it")
    return found


class Rows(Sequence[Entry]):
    """The usable rows of a WebVid table, parsed on use."""

    def __init__(self, path: Path, videos: Path, skipped: SkippedRows):
        self.path, self.videos = path, videos
        self._offsets, self._lines = array.array("q"), array.array("q")
        self._header: list[str] = []
        seen: set[int] = set()
        for offset, line, record in _records(path):
            cells = self._cells(record, line)
            if not self._header:
                self._take_header(cells, line)
                continue
            if cells is None or not any(cells):
                continue
            try:
                entry = self._entry(cells)
                number = int(entry.video_id) if entry.video_id.isdigit() else hash(entry.video_id)
                if number in seen:
                    raise RowError(f"field 'videoid': {entry.video_id} is here twice")
                seen.add(number)
            except RowError as error:
                skipped.add(cells[0], error, path, line)
                continue
            self._offsets.append(offset)
            self._lines.append(line)

    def _take_header(self, cells: list[str] | None, line: int) -> None:
        header = [c.strip() for c in cells or ()]
        missing = [c for c in COLUMNS if c not in header]
        if missing:
            raise UserError(
                f"{self.path}:{line}: no column {missing[0]!r} in the header "
                f"({clean(', '.join(header))[:200]})"
            )
        self._header = header

    def _cells(self, record: bytes, line: int) -> list[str] | None:
        text = decode(record, self.path, line)
        try:
            return next(csv.reader(text.splitlines(keepends=True), strict=True), None)
        except csv.Error as error:
            raise UserError(
                f"{self.path}:{line}: broken CSV ({error}); a quote inside a quoted field is "
                "doubled"
            ) from None

    def _entry(self, cells: list[str]) -> Entry:
        if len(cells) != len(self._header):
            raise RowError(f"{len(cells)} fields, but the header has {len(self._header)}")
        row = dict(zip(self._header, cells, strict=True))
        video, page = row["videoid"].strip(), row["page_dir"].strip()
        for name, value in (("videoid", video), ("page_dir", page)):
            file_name(value, f"field {name!r}")
        path = self.videos / page / f"{video}.mp4"
        return Entry(video, str(path), [caption(row["name"], "field 'name'")])

    def __len__(self) -> int:
        return len(self._offsets)

    def __iter__(self) -> Iterator[Entry]:
        with open(self.path, "rb") as file:
            for offset, line in zip(self._offsets, self._lines, strict=True):
                yield self._at(file, offset, line)

    def __getitem__(self, index):
        if isinstance(index, slice):
            part = copy.copy(self)
            part._offsets, part._lines = self._offsets[index], self._lines[index]
            return part
        with open(self.path, "rb") as file:  # not kept open: there are as many slices as shards
            return self._at(file, self._offsets[index], self._lines[index])

    def _at(self, file, offset: int, line: int) -> Entry:
        file.seek(offset)
        cells = self._cells(_record(file, self.path, line), line)
        assert cells is not None  # the constructor found a row at this offset
        return self._entry(cells)


def _records(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield (offset, line, bytes) of each row; a row continues while a quote is open."""
    try:
        file = open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    with file:
        offset, line = 0, 1
        while True:
            record = _record(file, path, line)
            if not record:
                break
            yield offset, line, record
            offset += len(record)
            line += max(1, record.count(b"\n"))
    if not offset:
        raise UserError(f"{path}:1: empty; a header with {', '.join(COLUMNS)} is needed")


def _record(file, path: Path, line: int) -> bytes:
    record = file.readline()
    quotes, lines = record.count(b'"'), 1
    while quotes % 2:
        more = file.readline()
        lines += 1
        if not more or lines > _MAX_LINES:
            raise UserError(f"{path}:{line}: a quote opened here is not closed")
        record += more
        quotes += more.count(b'"')
    return record


# No exact counts: links die, and the number of available videos falls.
DATA_SETS = (DataSet("webvid/captions", read_captions, tasks=("pretrain",), about=2_490_000),)
