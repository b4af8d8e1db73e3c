"""Batches from a stream of videos, decoded by threads while the device works.

Batches are padded to powers of two, so that few shapes are compiled, and padding never reaches a
result.
"""

import collections
import concurrent.futures
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from stoa_jax.errors import InputError, UserError
from stoa_jax.inference.videos import Failure

X = TypeVar("X")
Y = TypeVar("Y")


def check_batch_size(batch_size: int, call: str) -> None:
    """Raise InputError unless `batch_size` is a positive integer."""
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(
            f"{call}: batch_size is {batch_size!r}; it must be an integer of 1 or more"
        )


def power_of_two(count: int) -> int:
    """Return the smallest power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()


def padded(tree: Any, rows: int) -> Any:
    """Return arrays [n, …] padded with copies of their last row to [rows, …]."""

    def pad(x: np.ndarray) -> np.ndarray:
        missing = rows - len(x)
        return np.concatenate([x, np.repeat(x[-1:], missing, 0)]) if missing else x

    return jax.tree.map(pad, tree)


def run_padded(function: Callable[..., Any], *trees: Any) -> Any:
    """Apply `function` to arrays padded to a power of two of rows; the result stays padded."""
    rows = power_of_two(len(jax.tree.leaves(trees[0])[0]))
    return function(*padded(trees, rows))


def on_host(tree: Any, rows: int) -> Any:
    """Return device arrays [padded, …] as NumPy arrays [rows, …]."""
    return jax.tree.map(lambda x: np.asarray(x)[:rows], tree)


def in_batches(function: Callable[..., Any], size: int, *trees: Any) -> Any:
    """Apply `function` to arrays [n, …] in batches of at most `size` rows; return NumPy arrays."""
    count = len(jax.tree.leaves(trees[0])[0])
    out = []
    for start in range(0, count, size):
        part = jax.tree.map(lambda x, at=start: x[at : at + size], trees)
        rows = min(size, count - start)
        out.append((run_padded(function, *part), rows))
        if len(out) > 1:  # wait for a batch only after the next one has started
            out[-2] = on_host(*out[-2])
    out[-1] = on_host(*out[-1])
    return jax.tree.map(lambda *x: np.concatenate(x), *out)


def prepared(
    items: Sequence[X],
    prepare: Callable[[int, X], Y],
    *,
    batch_size: int,
    call: str,
    on_error: str,
    failed: list[Failure],
    progress: bool,
) -> Iterator[list[Y]]:
    """Yield batches of prepared videos in order, prepared ahead by threads.

    `prepare(index, item)` runs in threads. With `on_error="skip"` its errors are added to `failed`,
    otherwise they are raised.
    """
    check_batch_size(batch_size, call)
    if on_error not in ("raise", "skip"):
        raise InputError(f"{call}: on_error is {on_error!r}; use 'raise' or 'skip'")
    workers = min(8, os.cpu_count() or 1, max(1, len(items)))
    batch: list[Y] = []
    with (
        concurrent.futures.ThreadPoolExecutor(workers, "stoa-decode") as pool,
        progress_bar(len(items), call, progress) as bar,
    ):
        try:
            for index, future in _ahead(pool, prepare, items, 2 * max(batch_size, workers)):
                try:
                    batch.append(future.result())
                except UserError as error:
                    error = type(error)(f"{call}: video {index}: {error}")
                    if on_error == "raise":
                        raise error from None
                    failed.append(Failure(index, error))
                bar.update()
                if len(batch) == batch_size:
                    yield batch
                    batch = []
            if batch:
                yield batch
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def prepare_one(prepare: Callable[[], Y], call: str) -> Y:
    """Return `prepare()`; prefix an error with the name of the call."""
    try:
        return prepare()
    except UserError as error:
        raise type(error)(f"{call}: {error}") from None


def _ahead(
    pool: concurrent.futures.Executor,
    prepare: Callable[[int, X], Y],
    items: Iterable[X],
    count: int,
) -> Iterator[tuple[int, concurrent.futures.Future[Y]]]:
    """Yield (index, future) in order, with `count` futures submitted ahead."""
    waiting: collections.deque[tuple[int, concurrent.futures.Future[Y]]] = collections.deque()
    rest = enumerate(items)
    for index, item in itertools.islice(rest, count):
        waiting.append((index, pool.submit(prepare, index, item)))
    while waiting:
        yield waiting.popleft()
        for index, item in itertools.islice(rest, 1):
            waiting.append((index, pool.submit(prepare, index, item)))


def progress_bar(total: int, what: str, show: bool):
    """Return a progress bar on the error stream, or a silent one unless `show`."""
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit="video", disable=not show, dynamic_ncols=True)
