"""Scores of one query against many float16 vectors, by the fastest library that is installed.

That is numkong, else usearch, each only if a check finds it as accurate as `gamma` says, else NumPy
over the float32 vectors. The scores are approximate within `gamma`; `exact.py` turns them into an
exact result.
"""

import functools
import importlib.metadata
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_CHUNK = 32_768  # rows a thread takes at a time: 32 MB at d = 512
LIST_ERROR = 2.0**-22  # absolute, of a product that usearch gives as 1 - product


def gamma(dim: int) -> float:
    """Return the relative error of a float32 dot product of `dim` terms summed in any order.

    Twice the textbook bound, with room for the rounding of the result.
    """
    return (dim + 16) * 2.0**-23


def library(dim: int) -> str:
    """Return the library that scans vectors of a width: "numkong", "usearch" or "numpy"."""
    if half_kernel(dim) is not None:
        return "numkong"
    return "numpy" if half_lists(dim) is None else "usearch"


def described(dim: int) -> str:
    """Return the library that scans, with its version."""
    name = library(dim)
    return f"{name} {importlib.metadata.version(name)}"


def cores() -> int:
    """Return how many processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def pool() -> ThreadPoolExecutor:
    """Return the threads that scan; more than memory bandwidth feeds are of no use."""
    return ThreadPoolExecutor(min(cores(), 16), thread_name_prefix="stoa-scan")


@functools.cache
def half_kernel(dim: int) -> Callable | None:
    """Return numkong's `cdist`; None where it is missing or too inaccurate."""
    try:
        import numkong
    except ImportError:
        return None

    def products(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
        return np.asarray(numkong.cdist(query[None], vectors, "dot"))[0]

    return numkong.cdist if _accurate(products, dim) else None


@functools.cache
def half_lists(dim: int) -> Callable | None:
    """Return usearch's exhaustive search; None where it is missing or too inaccurate."""
    try:
        import usearch.index  # noqa: F401
    except ImportError:
        return None

    def products(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
        found, scores = _lists(vectors, query, len(vectors))
        return scores[np.argsort(found)]

    return _lists if _accurate(products, dim, LIST_ERROR) else None


def _accurate(products: Callable, dim: int, absolute: float = 0.0) -> bool:
    """Whether the dot products of float16 vectors are within `gamma` of the exact ones."""
    rng = np.random.default_rng(0)
    vectors = rng.uniform(-1, 1, (257, dim)).astype(np.float16)
    vectors[128:] = np.abs(vectors[128:])  # sums that grow, where a narrow accumulator loses most
    query = np.abs(vectors[-1])
    exact = vectors.astype(np.float64) @ query.astype(np.float64)
    scale = np.linalg.norm(vectors.astype(np.float64), axis=1) * np.linalg.norm(
        query.astype(np.float64)
    )
    error = np.abs(products(vectors, query) - exact)
    return bool((error <= gamma(dim) * scale + absolute).all())


def half_scores(scan: np.ndarray, query: np.ndarray, out: np.ndarray) -> None:
    """Write the dot products of float16 [n, d] and float16 [d] into float32 [n]."""
    kernel = half_kernel(scan.shape[1])
    assert kernel is not None

    def run(first: int) -> None:
        rows = slice(first, first + _CHUNK)
        out[rows] = np.asarray(kernel(query[None], scan[rows], "dot"))[0]

    list(pool().map(run, range(0, len(scan), _CHUNK)))


def best_half(scan: np.ndarray, query: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of float16 [n, d] with the `count` largest dot products, and these products.

    The products have an error of `LIST_ERROR` in addition to that of `gamma`.
    """
    lists = half_lists(scan.shape[1])
    assert lists is not None
    return lists(scan, query, count)


def _lists(scan: np.ndarray, query: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    from usearch.compiled import MetricKind
    from usearch.index import search

    found = search(scan, query[None], count, MetricKind.IP, exact=True, threads=cores())
    # usearch gives 1 - product in float32: its rounding is LIST_ERROR.
    return found.keys.ravel().astype(np.int64), 1 - found.distances.ravel().astype(np.float64)


def single_scores(vectors: np.ndarray, queries: np.ndarray, out: np.ndarray) -> None:
    """Write the dot products of float32 [n, d] and [q, d] into float32 [q, n], with BLAS."""
    for first in range(0, len(vectors), _CHUNK):
        rows = slice(first, first + _CHUNK)
        np.matmul(queries, vectors[rows].T, out=out[:, rows])
