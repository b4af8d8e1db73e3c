"""The Lance store: rows in a LanceDB table, in a directory or at an address.

For indexes that exceed one machine: Lance reads columns from object storage, commits each change as
a new version, and searches with an approximate vector index once `compact` has trained one.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from stoa_jax.errors import UserError
from stoa_jax.index.exact import Found
from stoa_jax.index.flat import FAILURES, checked_fingerprint, joined_settings
from stoa_jax.index.lock import writer_lock
from stoa_jax.index.manifest import Settings
from stoa_jax.index.rows import Rows, decoded, encoded, ordered
from stoa_jax.index.store import Block, Store

TABLE, SETTINGS = "segments", "settings"
ANN_ROWS = 100_000  # number of rows from which `compact` trains an approximate index
NPROBES, REFINE = 64, 10  # partitions read, and candidates per result scored in float32
_COLUMNS = ["id", "video", "start", "end"]
_IDS_AT_ONCE = 1000


class LanceStore:
    """A LanceDB table at one version, as of the opening or the last write through this object."""

    def __init__(self, place: Path | str):
        self._place = place
        self._database = _connect(place)
        try:
            self._table = self._database.open_table(TABLE)
            row = self._database.open_table(SETTINGS).to_arrow().to_pylist()[0]
            self._settings = Settings(**json.loads(row["json"]))
        except (ValueError, RuntimeError, FileNotFoundError, IndexError, TypeError) as error:
            raise UserError(f"{place}: no index here ({_line(error)})") from error
        self._table.checkout(self._table.version)  # changes of others stay invisible
        self._depth = 0

    @classmethod
    def create(cls, place: Path | str, settings: Settings) -> "LanceStore":
        """Create an empty store."""
        if cls.exists(place):
            raise UserError(f"{place}: already contains an index; open it, or remove it first")
        database = _connect(place)
        _replace_table(database, TABLE, schema=_schema(settings.dim, None))
        _write_settings(database, settings)
        return cls(place)

    @staticmethod
    def exists(place: Path | str) -> bool:
        """Return whether a directory or an address contains a store."""
        if isinstance(place, Path):
            return (place / f"{SETTINGS}.lance").exists()
        return SETTINGS in _connect(place).list_tables().tables

    @property
    def place(self) -> str:
        """The directory or address, for messages."""
        return str(self._place)

    @property
    def failures(self) -> Path | None:
        """Path of the record of failures; None at an address."""
        return self._place / FAILURES if isinstance(self._place, Path) else None

    @property
    def settings(self) -> Settings:
        """Settings that all rows share."""
        return self._settings

    @property
    def searched_by(self) -> str:
        """The library that searches, with its version."""
        return f"lancedb {importlib.metadata.version('lancedb')}"

    def __len__(self) -> int:
        return self._table.count_rows()

    def ids(self) -> list[str]:
        """Return each id once, in Lance's order."""
        return [decoded(i) for i in self._rows(["id"]).distinct_ids().to_pylist()]

    def videos_of(self, ids: Sequence[str]) -> dict[str, str | None]:
        """Return the videos of the given ids that are in the store."""
        found: dict[str, str | None] = {}
        for condition in _conditions(ids):
            near = self._rows(["id", "video"], condition).table
            for row in near.select(["id", "video"]).to_pylist():
                video = row["video"]
                found[decoded(row["id"])] = None if video is None else decoded(video)
        return found

    def search(self, queries: np.ndarray, k: int, *, exhaustive: bool = False) -> list[Found]:
        """Return the best rows for each query [q, d]; approximate once there is an ANN index."""
        columns = [*_COLUMNS, "vector"] + (["features"] if self._settings.fusion else [])
        found = []
        for query in queries:
            search = self._table.search(query.astype(np.float32), vector_column_name="vector")
            search = search.distance_type("dot").limit(k).select([*columns, "_distance"])
            search = search.nprobes(NPROBES).refine_factor(REFINE)
            table = (search.bypass_vector_index() if exhaustive else search).to_arrow()
            vectors = _matrix(table["vector"], self._settings.dim).astype(np.float64)
            scores = (vectors * query).sum(axis=1).astype(np.float32)
            order = ordered(table, scores)
            nowhere = np.full(len(order), -1)
            rows = table.drop_columns(["vector", "_distance"]).take(order)
            found.append(Found(nowhere, nowhere, scores[order], rows))
        return found

    def features(self, found: Found) -> np.ndarray:
        """Return the fusion features of found rows, in their order: float16 [k, f]."""
        return _matrix(found.rows["features"], -1)

    def blocks(self) -> Iterator[Block]:
        """Yield the rows with their vectors and features, some thousands at a time."""
        for batch in self._table.search().to_batches(8192):
            table = pa.Table.from_batches([batch])
            features = _matrix(table["features"], -1) if self._settings.fusion else None
            vectors = _matrix(table["vector"], self._settings.dim)
            yield Rows(table.select(_COLUMNS)), vectors, features

    @contextlib.contextmanager
    def writing(self, action: str) -> Iterator[None]:
        """Change the newest version; only one writer at a time in a local directory.

        At an address Lance itself orders commits, and no lock prevents two writers from adding
        the same video: give each writer its own shard.
        """
        if self._depth:
            yield
            return
        local = isinstance(self._place, Path)
        with writer_lock(self._place, action) if local else contextlib.nullcontext():  # type: ignore[arg-type]
            self._depth += 1
            try:
                self._table.checkout_latest()
                yield
            except OSError as error:
                raise UserError(
                    f"{self._place}: {action} was not committed: {_line(error)}"
                ) from error
            finally:
                self._depth -= 1
                self._table.checkout(self._table.version)

    def append(
        self,
        rows: Rows,
        vectors: np.ndarray,
        features: np.ndarray | None = None,
        fingerprint: str | None = None,
    ) -> None:
        """Add rows in one commit; an existing id with the same start raises UserError."""
        with self.writing("add"):
            settings = checked_fingerprint(self.place, self._settings, len(self), fingerprint)
            if not len(rows):
                return
            row = rows.repeated()
            if row is not None:
                raise UserError(f"{row.id!r}: given twice with the same start ({row.start})")
            ids = [decoded(i) for i in rows.distinct_ids().to_pylist()]
            for condition in _conditions(ids):
                row = self._rows(["id", "start"], condition).shared_with(rows)
                if row is not None:
                    raise UserError(
                        f"{row.id!r}: already in {self._place} with the same start "
                        f"({row.start}); delete it first"
                    )
            if settings != self._settings:
                self._write(settings)
            self._add(iter([(rows, vectors, features)]))

    def delete(self, ids: Sequence[str]) -> int:
        """Delete all rows of some ids in one commit; an unknown id raises UserError."""
        with self.writing("delete"):
            known = self.videos_of(ids)
            missing = [repr(i) for i in dict.fromkeys(ids) if i not in known]
            if missing:
                raise UserError(
                    f"{self._place}: no such id: {', '.join(missing[:3])}"
                    + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
                    + "; nothing was deleted"
                )
            before = self._table.count_rows()
            self._table.delete(" OR ".join(_conditions(ids)))
            return before - self._table.count_rows()

    def compact(self) -> None:
        """Rewrite small files, and train the approximate index if there are `ANN_ROWS` rows.

        Versions of the last seven days are kept for their readers.
        """
        with self.writing("compact"):
            if self._table.count_rows() >= ANN_ROWS:
                from lancedb.index import IvfPq

                self._table.create_index("vector", config=IvfPq(distance_type="dot"))
            self._table.optimize()

    def merge(self, parts: Sequence[Store]) -> None:
        """Add the rows of other stores, flat ones included, in one commit."""
        with self.writing("merge"):
            settings = self._settings
            for part in parts:
                settings = joined_settings(settings, part.settings, len(part), part.place)
            seen = [self._rows(["id", "start"])]
            seen += [rows for part in parts for rows, _, _ in part.blocks()]
            row = Rows.joined(
                [Rows(rows.table.select(["id", "start"])) for rows in seen]
            ).repeated()
            if row is not None:
                raise UserError(
                    f"{row.id!r}: in more than one of the indexes to merge, with the same start "
                    f"({row.start}); delete it from all but one"
                )
            self._add(block for part in parts for block in part.blocks())

    def set(self, **changes: Any) -> None:
        """Change settings in a separate commit."""
        with self.writing("set"):
            self._write(dataclasses.replace(self._settings, **changes))

    def _write(self, settings: Settings) -> None:
        _write_settings(self._database, settings)
        self._settings = settings

    def _add(self, blocks: Iterator[Block]) -> None:
        first = next(blocks, None)
        if first is None:
            return
        features = first[2]
        width = None if features is None else features.shape[1]
        schema = _schema(self._settings.dim, width)
        if width is not None and "features" not in self._table.schema.names:
            # Known only now; the table is still empty.
            self._table = _replace_table(self._database, TABLE, schema=schema)

        def batches() -> Iterator[pa.RecordBatch]:
            for block in _chain(first, blocks):
                yield from _arrow(schema, *block).to_batches()

        self._table.add(pa.RecordBatchReader.from_batches(schema, batches()))

    def _rows(self, columns: list[str], condition: str | None = None) -> Rows:
        search = self._table.search()
        search = search.where(condition) if condition else search
        return Rows(search.select(columns).to_arrow())


def _connect(place: Path | str) -> Any:
    try:
        import lancedb
    except ImportError as error:
        raise UserError(
            "backend='lance' needs LanceDB: pip install 'lancedb>=0.30,<0.41'"
        ) from error
    if isinstance(place, Path):
        place.mkdir(parents=True, exist_ok=True)
    try:
        return lancedb.connect(str(place))
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(f"{place}: LanceDB cannot open it: {_line(error)}") from error


def _write_settings(database: Any, settings: Settings) -> None:
    row = pa.table({"json": [json.dumps(dataclasses.asdict(settings))]})
    _replace_table(database, SETTINGS, data=row)


def _replace_table(database: Any, name: str, **content: Any) -> Any:
    mode = "overwrite" if name in database.list_tables().tables else "create"
    return database.create_table(name, mode=mode, **content)


def _schema(dim: int, features: int | None) -> pa.Schema:
    fields = [
        pa.field("id", pa.large_binary(), nullable=False),
        pa.field("video", pa.large_binary()),
        pa.field("start", pa.float64()),
        pa.field("end", pa.float64()),
        pa.field("vector", pa.list_(pa.float32(), dim)),
    ]
    if features is not None:
        fields.append(pa.field("features", pa.list_(pa.float16(), features)))
    return pa.schema(fields)


def _arrow(
    schema: pa.Schema, rows: Rows, vectors: np.ndarray, features: np.ndarray | None
) -> pa.Table:
    columns = [rows.table[name] for name in _COLUMNS]
    for matrix in (vectors, features):
        if matrix is not None:
            flat = pa.array(np.ascontiguousarray(matrix).reshape(-1))
            columns.append(pa.FixedSizeListArray.from_arrays(flat, matrix.shape[1]))
    return pa.Table.from_arrays(columns, schema=schema)


def _matrix(column: pa.ChunkedArray, width: int) -> np.ndarray:
    flat = pa.concat_arrays([chunk.flatten() for chunk in column.chunks]) if len(column) else None
    if flat is None:
        return np.zeros((0, max(width, 0)), np.float32)
    return flat.to_numpy(zero_copy_only=False).reshape(len(column), -1)


def _conditions(ids: Sequence[str]) -> list[str]:
    """Return filters for groups of ids; hexadecimal bytes need no quoting."""
    literals = []
    for identity in dict.fromkeys(ids):
        if not isinstance(identity, str):
            raise UserError(f"ids: {identity!r} is not a string")
        literals.append(f"X'{encoded(identity).hex()}'")
    return [
        f"id IN ({', '.join(literals[first : first + _IDS_AT_ONCE])})"
        for first in range(0, len(literals), _IDS_AT_ONCE)
    ]


def _chain(first: Block, rest: Iterator[Block]) -> Iterator[Block]:
    yield first
    yield from rest


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
