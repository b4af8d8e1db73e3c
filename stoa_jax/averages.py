"""Averages over valid entries of the global batch, also if a step runs in micro-batches.

A loss divides a sum by a count of valid entries. With `train.accumulate` the sum is that of one
micro-batch, but the count must be that of the whole batch: the average of the micro-batches' means
would give entries of a micro-batch with few valid ones more weight. The train step therefore traces
the loss twice. The first trace records every count (`recording`), and the second divides by their
totals (`over`). The compiler removes from the first trace everything that no count depends on.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

import jax.numpy as jnp
from jax import Array

_recorded: ContextVar[list[Array] | None] = ContextVar("recorded", default=None)
_totals: ContextVar[tuple[Iterator[Array], int] | None] = ContextVar("totals", default=None)


def mean(x: Array, mask: Array) -> Array:
    """Return the average of `x` where `mask` is True; 0 if it is True nowhere.

    `mask` may also hold weights: the average is then a weighted one.
    """
    mask = mask.astype(jnp.float32)
    return jnp.where(mask > 0, x * mask, 0).sum() / positive(global_count(mask.sum()))


def global_count(count: Array) -> Array:
    """Return the mean of a count over all micro-batches of the step, as float32."""
    count = count.astype(jnp.float32)
    recorded, totals = _recorded.get(), _totals.get()
    if recorded is not None:
        recorded.append(count)
    if totals is None:
        return count
    return next(totals[0]) / totals[1]


def positive(count: Array) -> Array:
    """Return a count with 1 in place of 0, to divide by."""
    return jnp.where(count > 0, count, 1.0)


@contextlib.contextmanager
def recording() -> Iterator[list[Array]]:
    """Record the counts of the averages that are traced in the block, in order."""
    counts: list[Array] = []
    token = _recorded.set(counts)
    try:
        yield counts
    finally:
        _recorded.reset(token)


@contextlib.contextmanager
def over(totals: Sequence[Array], micro_batches: int) -> Iterator[None]:
    """Let the averages in the block divide by totals that `recording` counted over the batch."""
    remaining = iter(totals)
    token = _totals.set((remaining, micro_batches))
    try:
        yield
    finally:
        _totals.reset(token)
    if next(remaining, None) is not None:
        raise RuntimeError("the loss computed fewer averages in its second trace than in its first")
