"""Scores of one query against many float16 vectors, by the fastest library that is here.

`numkong` is used where it is installed and proves accurate; NumPy over float32 otherwise. Either
way the scores are approximate within `gamma`; `exact.py` turns them into an exact result.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_CHUNK = 32_768  # rows a thread takes at a time: 32 MB at d = 512


def gamma(dim: int) -> float:
    """Return the relative error of a float32 dot product of `dim` terms, in any order of adding.

    Twice the textbook bound, with room for the rounding of the result.
    """
    return (dim + 16) * 2.0**-23


@functools.cache
def pool() -> ThreadPoolExecutor:
    """Return the threads that scan; more than memory bandwidth feeds are of no use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ThreadPoolExecutor(min(cores or 1, 16), thread_name_prefix="stoa-scan")


@functools.cache
def half_kernel(dim: int):
    """Return numkong's `cdist`, or None where it is missing or less accurate than `gamma` says."""
    try:
        import numkong
    except ImportError:
        return None
    rng = np.random.default_rng(0)
    vectors = rng.uniform(-1, 1, (257, dim)).astype(np.float16)
    vectors[128:] = np.abs(vectors[128:])  # sums that grow, where a narrow accumulator loses most
    query = np.abs(vectors[-1:])
    exact = vectors.astype(np.float64) @ query[0].astype(np.float64)
    scale = np.linalg.norm(vectors.astype(np.float64), axis=1) * np.linalg.norm(
        query.astype(np.float64)
    )
    found = np.asarray(numkong.cdist(query, vectors, "dot"))[0]
    return numkong.cdist if (np.abs(found - exact) <= gamma(dim) * scale).all() else None


def half_scores(scan: np.ndarray, query: np.ndarray, out: np.ndarray) -> None:
    """Write the dot products of float16 [n, d] and float16 [d] into float32 [n]."""
    kernel = half_kernel(scan.shape[1])
    assert kernel is not None

    def run(first: int) -> None:
        rows = slice(first, first + _CHUNK)
        out[rows] = np.asarray(kernel(query[None], scan[rows], "dot"))[0]

    list(pool().map(run, range(0, len(scan), _CHUNK)))


def single_scores(vectors: np.ndarray, queries: np.ndarray, out: np.ndarray) -> None:
    """Write the dot products of float32 [n, d] and [q, d] into float32 [q, n]; BLAS's threads."""
    for first in range(0, len(vectors), _CHUNK):
        rows = slice(first, first + _CHUNK)
        np.matmul(queries, vectors[rows].T, out=out[:, rows])
