"""The id, video, start and end of each vector's segment.

Ids and paths are stored as bytes (UTF-8 that allows lone surrogates), so every Python string,
including file names that are not valid Unicode, is restored exactly. Bytes also compare in the
order of the strings.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from stoa_jax.errors import UserError

pc: Any = pyarrow.compute  # type checkers do not see its functions
_SCHEMA = pa.schema(
    [
        pa.field("id", pa.large_binary(), nullable=False),
        pa.field("video", pa.large_binary()),
        pa.field("start", pa.float64()),
        pa.field("end", pa.float64()),
    ]
)


def encoded(text: str) -> bytes:
    """Encode a string as the bytes that are stored."""
    return text.encode("utf-8", "surrogatepass")


def decoded(content: bytes) -> str:
    """Decode stored bytes to the original string."""
    return content.decode("utf-8", "surrogatepass")


@dataclasses.dataclass(frozen=True)
class Row:
    """One stored segment of a video."""

    id: str
    video: str | None
    start: float | None
    end: float | None

    @property
    def order(self) -> tuple[str, float]:
        """Sort key of rows with equal scores."""
        return self.id, -math.inf if self.start is None else self.start


class Rows:
    """Columns of ids, videos and times, in the order of the vectors."""

    def __init__(self, table: pa.Table):
        self.table = table.combine_chunks()

    def __len__(self) -> int:
        return self.table.num_rows

    @classmethod
    def of(
        cls,
        ids: Sequence[str],
        videos: Sequence[str | None] | None = None,
        starts: Sequence[float | None] | np.ndarray | None = None,
        ends: Sequence[float | None] | np.ndarray | None = None,
    ) -> "Rows":
        """Check and collect columns; missing ones become empty."""
        if isinstance(ids, str | bytes):
            raise UserError(f"ids: pass a list of strings, not the single string {ids!r}")
        ids = list(ids)
        for position, identity in enumerate(ids):
            if not isinstance(identity, str):
                raise UserError(f"ids[{position}]: {identity!r} is not a string")
        count = len(ids)
        videos = [None] * count if videos is None else list(videos)
        columns = [
            pa.array([encoded(i) for i in ids], pa.large_binary()),
            pa.array([None if v is None else encoded(v) for v in videos], pa.large_binary()),
            _times(starts, count, "starts"),
            _times(ends, count, "ends"),
        ]
        rows = cls(pa.Table.from_arrays(columns, schema=_SCHEMA))
        rows._check_order()
        return rows

    def _check_order(self) -> None:
        backward = pc.less(self.table["end"], self.table["start"])
        if pc.any(backward).as_py():
            row = self[pc.index(backward, pa.scalar(True)).as_py()]
            raise UserError(f"{row.id!r}: it ends at {row.end:g} s, before its start {row.start:g}")

    def __getitem__(self, position: int) -> Row:
        identity, video, start, end = (
            self.table.column(i)[position].as_py() for i in range(len(_SCHEMA))
        )
        return Row(decoded(identity), None if video is None else decoded(video), start, end)

    @classmethod
    def joined(cls, parts: Sequence["Rows"]) -> "Rows":
        """Concatenate the rows of several parts."""
        return cls(pa.concat_tables([part.table for part in parts]))

    def where(self, alive: np.ndarray | None) -> "Rows":
        """Return the rows at which a mask is True; all rows for None."""
        return self if alive is None else Rows(self.table.filter(pa.array(alive)))

    def with_id_in(self, ids: "pa.Array") -> np.ndarray:
        """Return a mask of the rows whose id is among `ids`."""
        return pc.is_in(self.table["id"], value_set=ids).to_numpy()

    @property
    def ids(self) -> pa.ChunkedArray:
        """Ids in stored form."""
        return self.table["id"]

    def distinct_ids(self) -> "pa.Array":
        """Return each id once, in the order of its first row."""
        unique = pc.unique(self.table["id"])
        return unique.combine_chunks() if isinstance(unique, pa.ChunkedArray) else unique

    def repeated(self) -> Row | None:
        """Return a row that has the id and the start of another, or None."""
        if len(self.distinct_ids()) == len(self):
            return None
        counts = self.table.group_by(["id", "start"]).aggregate([([], "count_all")])
        many = counts.filter(pc.greater(counts["count_all"], 1))
        if not len(many):
            return None
        return Row(decoded(many["id"][0].as_py()), None, many["start"][0].as_py(), None)

    def shared_with(self, others: "Rows") -> Row | None:
        """Return a row of `others` whose id and start are also here, or None."""
        here = self.table.filter(pa.array(self.with_id_in(others.distinct_ids())))
        if not len(here):
            return None
        there = others.table.filter(pa.array(others.with_id_in(pc.unique(here["id"]))))
        keys = [
            set(zip(table["id"].to_pylist(), table["start"].to_pylist(), strict=True))
            for table in (here, there)
        ]
        for identity, start in keys[0] & keys[1]:
            return Row(decoded(identity), None, start, None)
        return None

    def parquet(self) -> pa.Buffer:
        """Return the rows as the content of a Parquet file."""
        sink = pa.BufferOutputStream()
        pq.write_table(self.table, sink, compression="zstd")
        return sink.getvalue()


def ordered(table: pa.Table, scores: np.ndarray) -> np.ndarray:
    """Return the order of rows by score, best first; equal scores by id, then start."""
    keys = {"score": scores, "id": table["id"], "start": pc.fill_null(table["start"], -np.inf)}
    sort = [("score", "descending"), ("id", "ascending"), ("start", "ascending")]
    return pc.sort_indices(pa.table(keys), sort_keys=sort).to_numpy()


def read_parquet(path: Path) -> Rows:
    """Read all rows of a segment."""
    try:
        # Arrow's threads release the content, some only after this function has returned. If it
        # were a Python object, they would need the GIL, and would abort a process that is ending.
        with pa.OSFile(str(path)) as file:
            content = file.read_buffer()
        return Rows(pq.read_table(pa.BufferReader(content), schema=_SCHEMA))
    except (pa.ArrowInvalid, pa.ArrowTypeError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: damaged ({reason}); copy the index again") from error


def _times(values, count: int, name: str) -> pa.Array:
    if values is None:
        return pa.nulls(count, pa.float64())
    values = [None if v is None or v != v else float(v) + 0.0 for v in values]
    if len(values) != count:
        raise UserError(f"{name}: {len(values)} values for {count} ids")
    for position, value in enumerate(values):
        if value is not None and not math.isfinite(value):
            raise UserError(f"{name}[{position}]: {value} is not a time in seconds")
    return pa.array(values, pa.float64())
