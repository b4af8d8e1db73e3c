"""Immutable segments: vectors in float32, a float16 copy for scanning, and their rows.

segments/NAME/vectors.npy    float32 [n, d], from which scores are computed
              scan.npy       float16 [n, d], the same times a power of two
              rows.parquet   id, video, start, end
              features.npy   float16 [n, ...], the fusion encoder's input (optional)
              deleted-*.npy  int64 [m], deleted positions (the manifest names one)
"""

import dataclasses
import math
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from stoa_jax.errors import UserError
from stoa_jax.index import files
from stoa_jax.index.manifest import SegmentEntry
from stoa_jax.index.rows import Rows, read_parquet

DIRECTORY = "segments"
VECTORS, SCAN, ROWS, FEATURES = "vectors.npy", "scan.npy", "rows.parquet", "features.npy"
BLOCK_ROWS = 16_384
MAX_NORM = 1e15  # squares of larger norms overflow float32

Blocks = Callable[[], Iterable[np.ndarray]]  # arrays of rows; called again for a second pass


@dataclasses.dataclass(frozen=True)
class Segment:
    """An opened segment. Its memory maps stay valid when the files are unlinked."""

    entry: SegmentEntry
    vectors: np.ndarray  # float32 [n, d]
    scan: np.ndarray  # float16 [n, d]
    rows: Rows
    alive: np.ndarray | None  # bool [n]; None: all are alive
    features: np.ndarray | None  # float16 [n, ...]

    def __len__(self) -> int:
        return self.entry.rows

    def alive_positions(self) -> np.ndarray:
        """Return the positions of the rows that are not deleted."""
        return np.arange(len(self)) if self.alive is None else np.flatnonzero(self.alive)


def new_name(generation: int) -> str:
    """Return a name that no segment has had before."""
    return f"{generation:08d}-{uuid.uuid4().hex[:12]}"


def write(
    root: Path, name: str, rows: Rows, dim: int, vectors: Blocks, features: Blocks | None = None
) -> SegmentEntry:
    """Write and sync a new segment; it is part of the index once the manifest names it."""
    count = len(rows)
    directory = root / DIRECTORY / name
    files.make_directory(directory)
    largest = max((float(np.abs(block).max(initial=0)) for block in vectors()), default=0.0)
    exponent = exponent_of(largest)
    norms, errors = [0.0], [0.0]

    def scan() -> Iterator[np.ndarray]:
        for block in vectors():
            half, norm, error = rounded(block, exponent)
            norms.append(float(norm.max(initial=0)))
            errors.append(float(error.max(initial=0)))
            yield half

    sizes = {
        VECTORS: files.write_array(directory / VECTORS, (count, dim), "<f4", vectors()),
        SCAN: files.write_array(directory / SCAN, (count, dim), "<f2", scan()),
        ROWS: files.write(directory / ROWS, [memoryview(rows.parquet())]),
    }
    if features is not None:
        shape = next(iter(features())).shape[1:]
        path = directory / FEATURES
        sizes[FEATURES] = files.write_array(path, (count, *shape), "<f2", features())
    files.sync_directory(directory)
    return SegmentEntry(name, count, sizes, exponent, max(norms), max(errors))


def rewrite(
    root: Path,
    generation: int,
    old: Sequence[Segment],
    dim: int,
    new: tuple[Rows, np.ndarray, np.ndarray | None] | None = None,
) -> SegmentEntry | None:
    """Write the live rows of some segments, then new ones, as one segment; None without rows."""
    parts = [segment.rows.where(segment.alive) for segment in old]
    parts += [new[0]] if new else []
    if not sum(map(len, parts)):
        return None
    with_features = [s.features is not None for s in old] + ([new[2] is not None] if new else [])

    def vectors() -> Iterator[np.ndarray]:
        for segment in old:
            yield from _blocks(segment.vectors, segment)
        if new:
            yield new[1]

    def features() -> Iterator[np.ndarray]:
        for segment in old:
            assert segment.features is not None
            yield from _blocks(segment.features, segment)
        if new and new[2] is not None:
            yield new[2]

    return write(
        root,
        new_name(generation),
        Rows.joined(parts),
        dim,
        vectors,
        features if all(with_features) else None,
    )


def write_deleted(
    root: Path, generation: int, segment: Segment, deleted: np.ndarray
) -> SegmentEntry:
    """Write the positions that are deleted from a segment, and return its new entry."""
    positions = np.flatnonzero(deleted)
    directory = root / DIRECTORY / segment.entry.name
    name = f"deleted-{new_name(generation)}.npy"
    size = files.write_array(directory / name, positions.shape, "<i8", [positions])
    files.sync_directory(directory)
    kept = {k: v for k, v in segment.entry.files.items() if k != segment.entry.deleted}
    return dataclasses.replace(
        segment.entry, files={**kept, name: size}, deleted=name, deleted_rows=len(positions)
    )


def open_segment(root: Path, entry: SegmentEntry, dim: int) -> Segment:
    """Map a segment into memory; FileNotFoundError if a writer has just removed it."""
    directory = root / DIRECTORY / entry.name
    for name, size in entry.files.items():
        found = (directory / name).stat().st_size
        if found != size:
            raise UserError(
                f"{directory / name}: {found} bytes instead of {size}: the file is cut "
                "short or changed; copy the index again or rebuild it"
            )
    rows = read_parquet(directory / ROWS)
    if len(rows) != entry.rows:
        raise UserError(f"{directory / ROWS}: {len(rows)} rows instead of {entry.rows}")
    return Segment(
        entry,
        _mapped(directory / VECTORS, "<f4", (entry.rows, dim)),
        _mapped(directory / SCAN, "<f2", (entry.rows, dim)),
        rows,
        _alive(directory, entry),
        _mapped(directory / FEATURES, "<f2", None) if FEATURES in entry.files else None,
    )


def with_deleted(root: Path, segment: Segment, entry: SegmentEntry) -> Segment:
    """Return an opened segment with the deletions of another entry of it."""
    alive = _alive(root / DIRECTORY / entry.name, entry)
    return dataclasses.replace(segment, entry=entry, alive=alive)


def rounded(vectors: np.ndarray, exponent: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Round vectors [n, d] times 2**exponent to float16.

    Also returns, unscaled and in float64 [n], the norms of the rounded vectors and their distances
    from the exact ones.
    """
    half = np.ldexp(vectors, exponent).astype(np.float16)
    exact = vectors.astype(np.float64)
    near = np.ldexp(half.astype(np.float64), -exponent)
    return half, np.linalg.norm(near, axis=1), np.linalg.norm(near - exact, axis=1)


def checked(vectors: np.ndarray, dim: int, ids: Sequence[str] | None = None) -> np.ndarray:
    """Return vectors as float32 [n, dim]; raise UserError for NaN, infinity or another width."""
    try:
        out = np.asarray(vectors, np.float32)
    except (TypeError, ValueError) as error:
        raise UserError(f"vectors: not an array of numbers ({error})") from None
    if out.ndim != 2 or out.shape[1] != dim:
        raise UserError(f"vectors: shape {list(out.shape)}; this index holds [n, {dim}]")
    bad = ~(np.linalg.norm(out.astype(np.float64), axis=1) <= MAX_NORM)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        name = f" of {ids[row]!r}" if ids is not None and row < len(ids) else f" {row}"
        raise UserError(
            f"vector{name}: it holds NaN, infinity or values beyond {MAX_NORM:g}; nothing was added"
        )
    return out


def exponent_of(largest: float) -> int:
    """Return the power of two that scales a largest value to between 0.5 and 1.

    From there float16 reaches down to 6e-8. The limits keep the scale itself within float32.
    """
    return 0 if largest == 0 else max(-50, min(50, -math.frexp(largest)[1]))


def _blocks(array: np.ndarray, segment: Segment) -> Iterator[np.ndarray]:
    positions = segment.alive_positions()
    for first in range(0, len(positions), BLOCK_ROWS):
        yield array[positions[first : first + BLOCK_ROWS]]


def _alive(directory: Path, entry: SegmentEntry) -> np.ndarray | None:
    if not entry.deleted:
        return None
    alive = np.ones(entry.rows, bool)
    try:
        alive[np.load(directory / entry.deleted)] = False
    except (ValueError, IndexError, EOFError) as error:
        raise UserError(f"{directory / entry.deleted}: damaged ({error})") from error
    return alive


def _mapped(path: Path, dtype: str, shape: tuple[int, ...] | None) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: damaged ({error}); copy the index again") from error
    if array.dtype != np.dtype(dtype) or (shape is not None and array.shape != shape):
        raise UserError(
            f"{path}: {array.dtype} {list(array.shape)} instead of {dtype} {shape}; "
            "copy the index again"
        )
    return array.view(np.ndarray)
