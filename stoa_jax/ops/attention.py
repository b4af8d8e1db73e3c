"""Scaled dot-product attention by XLA; `cudnn` holds the form for NVIDIA GPUs.

Shapes: N rows, S queries, S' keys, H heads, D head width.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from stoa_jax.ops.products import einsum_float32

_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite: a row without keys must not be NaN
_CPU_WEIGHTS = 2**21  # attention weights that a CPU computes at once; measured, its cache decides


@jax.custom_vjp
def attention(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """Attend from queries [N, S, H, D] to keys and values [N, S', H, D]: [N, S, H, D].

    `mask` [N or 1, S or 1, S'] is True where a query may attend. The softmax runs in float32. The
    backward pass keeps the weights once, in the dtype of the queries.
    """
    return _forward(q, k, v, mask)[0]


def _forward(q: Array, k: Array, v: Array, mask: Array | None) -> tuple[Array, Any]:
    x, weights = lax.platform_dependent(q, k, v, mask, cpu=_attend_on_cpu, default=_attend)
    return x, (q, k, v, weights)


def _backward(saved: Any, gradient: Array) -> tuple[Array, Array, Array, None]:
    to_q, to_k, to_v = lax.platform_dependent(
        *saved, gradient, cpu=_differentiate_on_cpu, default=_differentiate
    )
    return to_q, to_k, to_v, None


attention.defvjp(_forward, _backward)


# In these equations n is N, s is S, t is S', a is H and d is D.


def _attend(
    q: Array, k: Array, v: Array, mask: Array | None, queries: str = "nsad", keys: str = "ntad"
) -> tuple[Array, Array]:
    """Return the result and the weights [N, H, S, S']; queries and keys have the given axes."""
    logits = einsum_float32(f"{queries},{keys}->nast", q, k) * q.shape[-1] ** -0.5
    if mask is not None:
        logits = jnp.where(mask[:, None], logits, _MASKED)
    weights = jax.nn.softmax(logits, -1).astype(q.dtype)
    return jnp.einsum(f"nast,{keys}->{queries}", weights, v), weights


def _differentiate(
    q: Array,
    k: Array,
    v: Array,
    weights: Array,
    gradient: Array,
    queries: str = "nsad",
    keys: str = "ntad",
) -> tuple[Array, Array, Array]:
    """Return the gradients of queries, keys and values."""
    to_v = jnp.einsum(f"nast,{queries}->{keys}", weights, gradient)
    to_weights = einsum_float32(f"{queries},{keys}->nast", gradient, v)
    wide = weights.astype(jnp.float32)
    # Masked weights are zero, so no gradient reaches their logits.
    to_logits = wide * (to_weights - (to_weights * wide).sum(-1, keepdims=True))
    to_logits = (to_logits * q.shape[-1] ** -0.5).astype(q.dtype)
    to_q = jnp.einsum(f"nast,{keys}->{queries}", to_logits, k)
    to_k = jnp.einsum(f"nast,{queries}->{keys}", to_logits, q)
    return to_q, to_k, to_v


# XLA's products on a CPU are slow where rows, positions and heads are interleaved, and where the
# weights of all rows do not fit the cache. So a CPU puts the heads first and takes some rows at a
# time.


def _attend_on_cpu(q: Array, k: Array, v: Array, mask: Array | None) -> tuple[Array, Array]:
    def attend(q: Array, k: Array, v: Array, mask: Array | None) -> tuple[Array, Array]:
        q, k, v = _heads_first(q), _heads_first(k), _heads_first(v)
        x, weights = _attend(q, k, v, mask, "nasd", "natd")
        return _heads_first(x), weights

    if mask is not None:
        mask = jnp.broadcast_to(mask, (q.shape[0], *mask.shape[1:]))
    return _some_rows_at_a_time(attend, _rows_at_a_time(q, k), q, k, v, mask)


def _differentiate_on_cpu(
    q: Array, k: Array, v: Array, weights: Array, gradient: Array
) -> tuple[Array, Array, Array]:
    def differentiate(
        q: Array, k: Array, v: Array, weights: Array, gradient: Array
    ) -> tuple[Array, ...]:
        q, k, v, gradient = (_heads_first(x) for x in (q, k, v, gradient))
        gradients = _differentiate(q, k, v, weights, gradient, "nasd", "natd")
        return tuple(map(_heads_first, gradients))

    rows = _rows_at_a_time(q, k)
    return _some_rows_at_a_time(differentiate, rows, q, k, v, weights, gradient)


def _heads_first(x: Array) -> Array:
    """Swap positions and heads: [N, S, H, D] to [N, H, S, D], and back."""
    return x.swapaxes(1, 2)


def _rows_at_a_time(q: Array, k: Array) -> int | None:
    """Return the largest divisor of N whose weights fit, or None where N is symbolic."""
    n, s, heads, _ = q.shape
    shape = (n, s, heads, k.shape[1])
    if not all(isinstance(size, int) for size in shape):
        return None
    most = max(1, _CPU_WEIGHTS // math.prod(shape[1:]))
    return max((rows for rows in range(1, n + 1) if n % rows == 0 and rows <= most), default=1)


def _some_rows_at_a_time(work: Callable[..., Any], rows: int | None, *arrays: Array | None) -> Any:
    """Apply `work` to `rows` rows of the arrays at a time, in a loop."""
    n = next(x.shape[0] for x in arrays if x is not None)
    if rows is None or rows == n:
        return work(*arrays)
    parts = jax.tree.map(lambda x: x.reshape(n // rows, rows, *x.shape[1:]), arrays)
    done = lax.map(lambda part: work(*part), parts)
    return jax.tree.map(lambda x: x.reshape(n, *x.shape[2:]), done)
