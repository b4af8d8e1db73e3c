"""Exact nearest rows: scan approximately, keep all candidates, and score them again.

A row's score is float32(sum in float64 of its float32 vector times the query). A scanned score
differs from it by at most `slack`, which is proved for each segment from norms that were measured
when the segment was written. If L is the k-th best scanned score, the k-th best true score is at
least L - slack, so no row whose scanned score is below L - 2 slack can be among the best k.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from stoa_jax.index import scan
from stoa_jax.index.manifest import SegmentEntry
from stoa_jax.index.rows import decoded, ordered
from stoa_jax.index.segments import Segment, exponent_of

_BATCH_BYTES = 1 << 28  # scanned scores at a time
_FEW = 4  # up to so many queries, one float16 pass each is faster than one float32 pass for all
_RESCORE_ROWS = 4096


@dataclasses.dataclass(frozen=True)
class Found:
    """The best rows of one query, best first."""

    segments: np.ndarray  # int [k], into the list of segments
    positions: np.ndarray  # int [k], within the segment
    scores: np.ndarray  # float32 [k]
    rows: pa.Table  # id, video, start, end

    @property
    def ids(self) -> list[str]:
        """The ids of the rows."""
        return [decoded(identity) for identity in self.rows["id"].to_pylist()]


def search(segments: Sequence[Segment], queries: np.ndarray, k: int) -> Iterator[Found]:
    """Yield the best `k` live rows for each query [q, d] in float64, or all if there are fewer.

    Equal scores are ordered by id, then start.
    """
    k = min(k, sum(segment.entry.alive for segment in segments))
    if k < 1:
        nothing = pa.table({name: [] for name in ("id", "video", "start", "end")})
        empty = np.zeros(0, np.int64)
        yield from (Found(empty, empty, np.zeros(0, np.float32), nothing) for _ in queries)
        return
    few = len(queries) <= _FEW and scan.library(queries.shape[1]) != "numpy"
    if few and scan.library(queries.shape[1]) == "usearch":
        yield from (_search_lists(segments, query, k) for query in queries)
        return
    count = sum(map(len, segments))
    step = 1 if few else max(1, _BATCH_BYTES // (4 * count))
    for first in range(0, len(queries), step):
        batch = queries[first : first + step]
        scores = np.empty((len(batch), count), np.float32)
        slacks = (_scan_half if few else _scan_single)(segments, batch, scores)
        for query, scanned, slack in zip(batch, scores, slacks.T, strict=True):
            yield _best(segments, query, scanned, slack, k)


@dataclasses.dataclass(frozen=True)
class _Half:
    """One query, rounded to float16 for scanning."""

    values: np.ndarray  # float16 [d], the query times 2**exponent
    exponent: int
    norm: float  # of the query
    near_norm: float  # of the rounded query
    shift: float  # the distance between the two

    @classmethod
    def of(cls, query: np.ndarray) -> "_Half":
        exponent = exponent_of(float(np.abs(query).max(initial=0)))
        half = np.ldexp(query, exponent).astype(np.float16)
        near = np.ldexp(half.astype(np.float64), -exponent)
        norms = (float(np.linalg.norm(x)) for x in (query, near, query - near))
        return cls(half, exponent, *norms)

    def scale(self, entry: SegmentEntry) -> float:
        """Return what turns a scanned product into a score."""
        return 2.0 ** -(entry.exponent + self.exponent)

    def slack(self, entry: SegmentEntry) -> float:
        """Return how far a scanned score may be from the true one."""
        return (
            self.norm * entry.error
            + self.shift * entry.norm
            + (scan.gamma(len(self.values)) + 2.0**-22)
            * (self.near_norm * entry.norm + self.norm * entry.error)
        )


def _scan_half(segments: Sequence[Segment], queries: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Scan float16 for one query; returns the slack [segments, 1]."""
    half = _Half.of(queries[0])
    for segment, part in _parts(segments, out[0]):
        scan.half_scores(segment.scan, half.values, part)
        part *= np.float32(half.scale(segment.entry))
        _bury(segment, part)
    return _widened([half.slack(segment.entry) for segment in segments])[:, None]


def _search_lists(segments: Sequence[Segment], query: np.ndarray, k: int) -> Found:
    """Search by lists of each segment's best rows, longer until no other row can be among them."""
    half = _Half.of(query)
    slack = _widened(
        # usearch rounds 1 - p, an error of LIST_ERROR * (1 + |p|); the slack covers the part in p.
        [half.slack(s.entry) + scan.LIST_ERROR * half.scale(s.entry) for s in segments]
    )
    count = 2 * k + 32
    while True:
        scores = np.full(sum(map(len, segments)), -np.inf, np.float32)
        outside = []  # the most that a row outside of its segment's list may have scored
        for segment, part in _parts(segments, scores):
            rows, found = scan.best_half(segment.scan, half.values, min(count, len(segment)))
            part[rows] = found * half.scale(segment.entry)
            outside.append(part[rows].min() if count < len(segment) else -np.inf)
            _bury(segment, part)
        if np.isfinite(scores).sum() >= k and (outside < _lowest(scores, slack, k)).all():
            return _best(segments, query, scores, slack, k)
        count *= 4


def _scan_single(segments: Sequence[Segment], queries: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Scan float32 for several queries; return the slack [segments, q]."""
    single = queries.astype(np.float32)
    norms = np.linalg.norm(queries, axis=1)
    shifts = np.linalg.norm(queries - single, axis=1)
    slacks = []
    for segment, part in _parts(segments, out):
        longest = segment.entry.norm + segment.entry.error
        scan.single_scores(segment.vectors, single, part)
        error = shifts + (scan.gamma(queries.shape[1]) + 2.0**-22) * (norms + shifts)
        slacks.append(error * longest)
        _bury(segment, part)
    return _widened(slacks)


def _widened(slacks: list) -> np.ndarray:
    # Room for the rounding of the bound itself, and for scores below float32's range.
    return np.asarray(slacks) * (1 + 1e-6) + 1e-35


def _parts(segments: Sequence[Segment], out: np.ndarray) -> Iterator[tuple[Segment, np.ndarray]]:
    first = 0
    for segment in segments:
        yield segment, out[..., first : first + len(segment)]
        first += len(segment)


def _bury(segment: Segment, scores: np.ndarray) -> None:
    if segment.alive is not None:
        scores[..., ~segment.alive] = -np.inf


def _best(
    segments: Sequence[Segment], query: np.ndarray, scanned: np.ndarray, slack: np.ndarray, k: int
) -> Found:
    lowest = _lowest(scanned, slack, k)
    where, positions, scores, tables = [], [], [], []
    for index, (segment, part) in enumerate(_parts(segments, scanned)):
        near = np.flatnonzero(part >= lowest[index])
        if len(near):
            where.append(np.full(len(near), index))
            positions.append(near)
            scores.append(true_scores(segment.vectors, near, query))
    where, positions, scores = map(np.concatenate, (where, positions, scores))
    kept = scores >= np.partition(scores, len(scores) - k)[len(scores) - k]
    where, positions, scores = where[kept], positions[kept], scores[kept]
    for index in np.unique(where):  # ascending, like `where`
        tables.append(segments[index].rows.table.take(positions[where == index]))
    rows = pa.concat_tables(tables)
    order = ordered(rows, scores)[:k]
    return Found(where[order], positions[order], scores[order], rows.take(order))


def _lowest(scanned: np.ndarray, slack: np.ndarray, k: int) -> np.ndarray:
    """Return the scanned score [segments] below which no row can be among the best `k`."""
    kth = float(np.partition(scanned, len(scanned) - k)[len(scanned) - k])
    lowest = (kth - slack.max() - slack).astype(np.float32)
    return np.nextafter(lowest, np.float32(-np.inf))


def true_scores(vectors: np.ndarray, positions: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Return float32 scores computed in float64; equal vectors get equal scores everywhere."""
    out = np.empty(len(positions), np.float32)
    for first in range(0, len(positions), _RESCORE_ROWS):
        part = slice(first, first + _RESCORE_ROWS)
        # A sum over rows, not a matrix product: BLAS may add in another order at the edges.
        out[part] = (vectors[positions[part]].astype(np.float64) * query).sum(axis=1)
    return out
