"""Time search among a million vectors, and check that its results are exact.

    pip install -r requirements-bench.txt
    python -m benchmarks.search --dim=512
    python -m benchmarks.search --dim=768 --queries=200

A tenth of the rows are near-ties on purpose: clusters of 500 rows, some of them equal, that lie
closer together than float16 resolves. Every other query is the centre of a cluster, so its 100th
result is one of many that differ in the seventh digit. Exactness is checked against a float64
product of all rows with all queries: no row outside a result may score higher than the last row in
it. FAISS and usearch, if installed, search the same rows with the same queries.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import stoa_jax
from stoa_jax.index import exact

BLOCK = 50_000
CLUSTER = 500
TIE = 2e-7  # scores are float32: closer ones may be in either order


def unit(x: np.ndarray) -> np.ndarray:
    """Return rows of unit length, float32."""
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def blocks(rows: int, dim: int, centres: np.ndarray) -> Iterator[np.ndarray]:
    """Yield blocks of unit vectors, a tenth of them in clusters of near-ties."""
    rng = np.random.default_rng(0)
    which = 0
    for first in range(0, rows, BLOCK):
        block = rng.standard_normal((min(BLOCK, rows - first), dim), dtype=np.float32)
        for start in range(0, len(block) // 10 - CLUSTER + 1, CLUSTER):
            near = block[start : start + CLUSTER]
            step = 10.0 ** rng.uniform(-7, -4)
            near[:] = centres[which % len(centres)] + step * unit(near)
            near[: CLUSTER // 10] = near[0]
            which += 1
        yield unit(block)


def timed(search: Callable[[np.ndarray], object], queries: np.ndarray, repeats: int) -> str:
    """Return minimum, median and 95th percentile of the time of one query, in ms."""
    times = []
    for i in range(repeats):
        query = queries[i % len(queries)]
        start = time.perf_counter()
        search(query)
        times.append(1e3 * (time.perf_counter() - start))
    low, median, high = np.percentile(times, [0, 50, 95])
    return f"{low:.0f} / {median:.0f} / {high:.0f}"


def violations(vectors: Iterator[np.ndarray], queries: np.ndarray, found, scores) -> int:
    """Count the rows that score above the last result of a query and are missing from it.

    `found` [q, k] are row numbers and `scores` their reported scores; also checks those.
    """
    last = scores[:, -1:].astype(np.float64)
    above = np.zeros(len(queries), int)
    true = np.full(scores.shape, np.nan)
    first = 0
    for block in vectors:
        product = queries.astype(np.float64) @ block.astype(np.float64).T
        above += (product > last + TIE).sum(1)
        row, column = np.nonzero((found >= first) & (found < first + len(block)))
        true[row, column] = product[row, found[row, column] - first]
        first += len(block)
    worst = np.abs(true - scores).max()
    assert worst < 1e-6, f"a score is off by {worst}"
    assert all(len(set(row)) == len(row) for row in found.tolist()), "a row was found twice"
    return int((above - (true > last + TIE).sum(1)).sum())


def others(
    vectors: Callable[[], Iterator[np.ndarray]], rows: int, dim: int, k: int
) -> Iterator[tuple[str, Callable]]:
    """Yield (name, search) for each library that is installed."""
    try:
        import faiss
    except ImportError:
        print("faiss is not installed")
    else:
        for name, kind in [("FAISS flat, float32", "Flat"), ("FAISS SQ, float16", "SQfp16")]:
            index = faiss.index_factory(dim, kind, faiss.METRIC_INNER_PRODUCT)
            index.train(next(vectors()))
            for block in vectors():
                index.add(block)
            yield name, lambda query, index=index: index.search(query[None], k)[1][0]
            del index
    try:
        from usearch.index import search
    except ImportError:
        print("usearch is not installed")
    else:
        held = np.empty((rows, dim), np.float16)
        first = 0
        for block in vectors():
            held[first : first + len(block)] = block
            first += len(block)

        def exact_half(query: np.ndarray) -> np.ndarray:
            return search(held, query.astype(np.float16)[None], k, "ip", exact=True).keys.ravel()

        yield "usearch exact, float16", exact_half


def main() -> None:
    """Build the index, time it, check its results, and compare it with other libraries."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--queries", type=int, default=1000, help="queries that check exactness")
    parser.add_argument("--repeats", type=int, default=60, help="number of timed queries")
    parser.add_argument("--directory", help="keep the index here")
    args = parser.parse_args()
    rng = np.random.default_rng(1)
    centres = unit(rng.standard_normal((max(1, args.rows // 10 // CLUSTER), args.dim)))
    queries = unit(rng.standard_normal((args.queries, args.dim)))
    near = centres[np.arange(len(queries[::2])) % len(centres)]
    queries[::2] = unit(near + 1e-5 * unit(rng.standard_normal(near.shape)))

    def vectors() -> Iterator[np.ndarray]:
        return blocks(args.rows, args.dim, centres)

    cores = len(os.sched_getaffinity(0))
    print(f"{args.rows} rows of {args.dim}, k = {args.k}, {cores} core(s)")
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(args.directory or temporary) / "index"
        if not directory.exists():
            index = stoa_jax.Index.create(directory, dim=args.dim)
            start, first = time.perf_counter(), 0
            for block in vectors():
                index.add_vectors(block, [str(i) for i in range(first, first + len(block))])
                first += len(block)
            print(f"add: {time.perf_counter() - start:.1f} s, in commits of {BLOCK} rows")
            index.close()
        start = time.perf_counter()
        index = stoa_jax.Index.open(directory)
        print(f"open: {time.perf_counter() - start:.2f} s")
        ours = lambda query: index.search_vectors(query[None], args.k)  # noqa: E731
        timed(ours, queries, 5)
        print(f"searched by {index.searched_by}")
        print(f"stoa_jax, exact: {timed(ours, queries[1::2], args.repeats)} ms a query")
        print(f"  near-ties: {timed(ours, queries[::2], args.repeats)}")
        start = time.perf_counter()
        ids, scores = index.search_vectors(queries, args.k)
        seconds = time.perf_counter() - start
        print(f"{len(queries)} queries at once: {seconds:.1f} s")
        found = np.array(ids, np.int64)
        print(f"rows missed, at once: {violations(vectors(), queries, found, scores)}")
        singles = [ours(query) for query in queries]
        single = np.array([ids[0] for ids, _ in singles], np.int64)
        assert (single == found).all(), "one by one and at once differ"
        print("one by one: the same ids in the same order")
        for missing, by in [("half_kernel", "usearch"), ("half_lists", "numpy")]:
            setattr(exact.scan, missing, lambda dim: None)
            if exact.scan.library(args.dim) != by:
                continue
            timed(ours, queries, 3)
            spent = timed(ours, queries[1::2], 20), timed(ours, queries[::2], 20)
            print(f"stoa_jax by {by}: {spent[0]} ms a query; near-ties: {spent[1]}")
            few = range(0, len(queries), max(1, len(queries) // 20))
            same = all(ours(queries[i])[0][0] == ids[i] for i in few)
            print(f"  the same ids for {len(few)} queries: {same}")
        index.close()
        for name, search in others(vectors, args.rows, args.dim, args.k):
            timed(search, queries, 3)
            overlap = np.mean(
                [
                    len(set(search(queries[i]).tolist()) & set(found[i].tolist())) / args.k
                    for i in range(min(40, len(queries)))
                ]
            )
            spent = timed(search, queries[1::2], 15)
            print(f"{name}: {spent} ms; {100 * overlap:.1f} % of the exact ids")


if __name__ == "__main__":
    main()
