"""Scaled dot-product attention by XLA; `cudnn` holds the form for NVIDIA GPUs.

Shapes: N rows, S queries, S' keys, H heads, D head width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from stoa_jax.ops.products import einsum_float32

_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite: a row without keys must not be NaN


@jax.custom_vjp
def attention(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """Attend from queries [N, S, H, D] to keys and values [N, S', H, D]: [N, S, H, D].

    `mask` [N or 1, S or 1, S'] is True where a query may attend. The softmax runs in float32. The
    backward pass keeps the weights once, in the dtype of the queries.
    """
    return _forward(q, k, v, mask)[0]


def _forward(q: Array, k: Array, v: Array, mask: Array | None) -> tuple[Array, Any]:
    logits = einsum_float32("nsad,ntad->nast", q, k) * q.shape[-1] ** -0.5
    if mask is not None:
        logits = jnp.where(mask[:, None], logits, _MASKED)
    weights = jax.nn.softmax(logits, -1).astype(q.dtype)
    return jnp.einsum("nast,ntad->nsad", weights, v), (q, k, v, weights)


def _backward(saved: Any, gradient: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, weights = saved
    to_v = jnp.einsum("nast,nsad->ntad", weights, gradient)
    to_weights = einsum_float32("nsad,ntad->nast", gradient, v)
    wide = weights.astype(jnp.float32)
    # Masked weights are zero, so no gradient reaches their logits.
    to_logits = wide * (to_weights - (to_weights * wide).sum(-1, keepdims=True))
    to_logits = (to_logits * q.shape[-1] ** -0.5).astype(q.dtype)
    to_q = jnp.einsum("nast,ntad->nsad", to_logits, k)
    to_k = jnp.einsum("nast,nsad->ntad", to_logits, q)
    return to_q, to_k, to_v, None


attention.defvjp(_forward, _backward)
