"""Exact nearest rows: scan approximately, keep all that could be among the best, score them anew.

A row's score is float32(sum in float64 of its float32 vector times the query). A scanned score
differs from it by at most `slack`, which is proved for each segment from norms that were measured
when the segment was written. With L the k-th best scanned score, the k-th best true score is at
least L - slack, so no row whose scanned score is below L - 2 slack can be among the best k.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from stoa_jax.index import scan
from stoa_jax.index.rows import decoded, ordered
from stoa_jax.index.segments import Segment, exponent_of

_BATCH_BYTES = 1 << 28  # of scanned scores at a time
_FEW = 4  # up to so many queries, one float16 pass each beats one float32 pass for all
_RESCORE_ROWS = 4096


@dataclasses.dataclass(frozen=True)
class Found:
    """The best rows of one query, the best first."""

    segments: np.ndarray  # int [k], into the list of segments
    positions: np.ndarray  # int [k], in the segment
    scores: np.ndarray  # float32 [k]
    rows: pa.Table  # id, video, start, end

    @property
    def ids(self) -> list[str]:
        """The ids of the rows."""
        return [decoded(identity) for identity in self.rows["id"].to_pylist()]


def search(segments: Sequence[Segment], queries: np.ndarray, k: int) -> Iterator[Found]:
    """Yield the best `k` live rows for each query [q, d] in float64; fewer where there are fewer.

    Equal scores are ordered by id, then start.
    """
    k = min(k, sum(segment.entry.alive for segment in segments))
    if k < 1:
        nothing = pa.table({name: [] for name in ("id", "video", "start", "end")})
        empty = np.zeros(0, np.int64)
        yield from (Found(empty, empty, np.zeros(0, np.float32), nothing) for _ in queries)
        return
    few = len(queries) <= _FEW and scan.half_kernel(queries.shape[1]) is not None
    count = sum(map(len, segments))
    step = 1 if few else max(1, _BATCH_BYTES // (4 * count))
    for first in range(0, len(queries), step):
        batch = queries[first : first + step]
        scores = np.empty((len(batch), count), np.float32)
        slacks = (_scan_half if few else _scan_single)(segments, batch, scores)
        for query, scanned, slack in zip(batch, scores, slacks.T, strict=True):
            yield _best(segments, query, scanned, slack, k)


def _scan_half(segments: Sequence[Segment], queries: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Scan float16 for one query; returns the slack [segments, 1]."""
    (query,) = queries
    exponent = exponent_of(float(np.abs(query).max(initial=0)))
    half = np.ldexp(query, exponent).astype(np.float16)
    near = np.ldexp(half.astype(np.float64), -exponent)
    norm, near_norm = np.linalg.norm(query), np.linalg.norm(near)
    shift = np.linalg.norm(query - near)
    slacks = []
    for segment, part in _parts(segments, out[0]):
        entry = segment.entry
        scan.half_scores(segment.scan, half, part)
        part *= np.float32(2.0 ** -(entry.exponent + exponent))
        product = near_norm * entry.norm
        slacks.append(
            norm * entry.error
            + shift * entry.norm
            + (scan.gamma(len(query)) + 2.0**-22) * (product + norm * entry.error)
        )
        _bury(segment, part)
    return _widened(slacks)[:, None]


def _scan_single(segments: Sequence[Segment], queries: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Scan float32 for several queries; returns the slack [segments, q]."""
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
    # Room for the rounding of the bound itself, and for scores that leave float32 below.
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
    kth = float(np.partition(scanned, len(scanned) - k)[len(scanned) - k])
    floor = kth - slack.max()
    where, positions, scores, tables = [], [], [], []
    for index, (segment, part) in enumerate(_parts(segments, scanned)):
        lowest = np.nextafter(np.float32(floor - slack[index]), np.float32(-np.inf))
        near = np.flatnonzero(part >= lowest)
        if len(near):
            where.append(np.full(len(near), index))
            positions.append(near)
            scores.append(true_scores(segment.vectors, near, query))
    where, positions, scores = map(np.concatenate, (where, positions, scores))
    kept = scores >= np.partition(scores, len(scores) - k)[len(scores) - k]
    where, positions, scores = where[kept], positions[kept], scores[kept]
    for index in np.unique(where):  # ascending, as `where` is
        tables.append(segments[index].rows.table.take(positions[where == index]))
    rows = pa.concat_tables(tables)
    order = ordered(rows, scores)[:k]
    return Found(where[order], positions[order], scores[order], rows.take(order))


def true_scores(vectors: np.ndarray, positions: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Return float32 scores computed in float64, equal for equal vectors wherever they stand."""
    out = np.empty(len(positions), np.float32)
    for first in range(0, len(positions), _RESCORE_ROWS):
        part = slice(first, first + _RESCORE_ROWS)
        # A sum over rows, not a matrix product: BLAS may add in another order at the edges.
        out[part] = (vectors[positions[part]].astype(np.float64) * query).sum(axis=1)
    return out
