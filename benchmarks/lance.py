"""Compare search in LanceDB with the flat index: its time, and the recall of its ANN index.

    pip install 'lancedb>=0.30,<0.41'
    python -m benchmarks.lance --rows=200000

Rows form clusters, like embeddings of videos: random centres with rows around them. Queries are
new points of the same clusters.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

import stoa_jax
from benchmarks.search import timed, unit
from stoa_jax.index import lance


def main() -> None:
    """Fill both stores, train the approximate index, time and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--queries", type=int, default=100)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    centres = unit(rng.standard_normal((2000, args.dim)))

    def points(count: int) -> np.ndarray:
        near = centres[rng.integers(len(centres), size=count)]
        return unit(near + 0.7 * unit(rng.standard_normal((count, args.dim))))

    vectors, queries = points(args.rows), points(args.queries)
    ids = [str(i) for i in range(args.rows)]
    lance.ANN_ROWS = min(lance.ANN_ROWS, args.rows)
    with tempfile.TemporaryDirectory() as directory:
        indexes = {}
        for backend in ("flat", "lance"):
            place = Path(directory) / backend
            indexes[backend] = stoa_jax.Index.create(place, dim=args.dim, backend=backend)
            start = time.perf_counter()
            indexes[backend].add_vectors(vectors, ids)
            print(f"{backend}: add {args.rows} rows in {time.perf_counter() - start:.1f} s")
        flat, ann = indexes["flat"], indexes["lance"]
        exact = [set(found) for found in flat.search_vectors(queries, args.k)[0]]
        print(f"flat: {timed(lambda q: flat.search(q, args.k), queries, 30)} ms a query")
        print(f"lance, all rows: {timed(lambda q: ann.search(q, args.k), queries, 10)} ms")
        start = time.perf_counter()
        ann.compact()
        print(f"lance: the ANN index trained in {time.perf_counter() - start:.0f} s")
        for nprobes, refine in [(20, 1), (64, 10), (200, 20)]:
            lance.NPROBES, lance.REFINE = nprobes, refine
            found = ann.search_vectors(queries, args.k)[0]
            recall = np.mean([len(set(f) & e) / args.k for f, e in zip(found, exact, strict=True)])
            spent = timed(lambda q: ann.search(q, args.k), queries, 30)
            print(
                f"lance, ANN, {nprobes} probes, refine {refine}: {spent} ms, recall@{args.k} "
                f"{100 * recall:.1f} %"
            )


if __name__ == "__main__":
    main()
