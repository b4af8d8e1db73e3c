"""Arithmetic of about 48 bits: pairs of float32 (a value and its rounding error).

Pairs are normalised, so that they compare lexicographically.
"""

import jax.numpy as jnp
from jax import Array, lax

Pair = tuple[Array, Array]


def _two_sum(a: Array, b: Array) -> Pair:
    total = a + b
    b_used = total - a
    return total, (a - (total - b_used)) + (b - b_used)


def add(a: Pair, b: Pair) -> Pair:
    """Return a + b."""
    high, low = _two_sum(a[0], b[0])
    low = low + (a[1] + b[1])
    total = high + low
    return total, low - (total - high)


def negative(a: Pair) -> Pair:
    """Return -a."""
    return -a[0], -a[1]


def less(a: Pair, b: Pair) -> Array:
    """Return where a < b."""
    return (a[0] < b[0]) | ((a[0] == b[0]) & (a[1] < b[1]))


def where(condition: Array, a: Pair, b: Pair) -> Pair:
    """Choose elements of a where the condition holds, else of b."""
    return jnp.where(condition, a[0], b[0]), jnp.where(condition, a[1], b[1])


def at(a: Pair, index: Array) -> Pair:
    """Return the elements of a at an index."""
    return a[0][index], a[1][index]


def minimum(a: Pair, allowed: Array, axis: int) -> tuple[Pair, Array]:
    """Return the least allowed pair along an axis and its first index; (inf, inf), 0 if none is."""
    high = jnp.where(allowed, a[0], jnp.inf).min(axis, keepdims=True)
    low = jnp.where(allowed & (a[0] == high), a[1], jnp.inf)
    lowest = low.min(axis, keepdims=True)
    # Three plain reductions are faster than an argmin, which does not vectorise.
    positions = lax.broadcasted_iota(jnp.int32, low.shape, axis % low.ndim)
    index = jnp.where(low == lowest, positions, low.shape[axis] - 1).min(axis)
    return (high.squeeze(axis), lowest.squeeze(axis)), index
