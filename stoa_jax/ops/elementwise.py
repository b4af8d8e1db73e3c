"""Layer normalisation and activations whose derivatives need little memory.

Automatic differentiation keeps several float32 copies of the input. These keep the input in its own
dtype (and two numbers per row) and recompute the rest.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

EPSILON = 1e-5


@jax.custom_vjp
def layer_norm(x: Array, scale: Array, bias: Array) -> Array:
    """Normalise the last axis of `x` in float32; the result has the dtype of `x`."""
    return _layer_norm(x, scale, bias)[0]


def _layer_norm(x: Array, scale: Array, bias: Array) -> tuple[Array, Any]:
    y = x.astype(jnp.float32)
    mean = y.mean(-1, keepdims=True)
    y = y - mean
    reciprocal = jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + EPSILON)
    return (y * reciprocal * scale + bias).astype(x.dtype), (x, mean, reciprocal, scale)


def _layer_norm_backward(saved: Any, gradient: Array) -> tuple[Array, Array, Array]:
    x, mean, reciprocal, scale = saved
    gradient = gradient.astype(jnp.float32)
    normed = (x.astype(jnp.float32) - mean) * reciprocal
    rows = tuple(range(x.ndim - 1))
    scaled = gradient * scale
    along = (scaled * normed).mean(-1, keepdims=True)
    to_x = reciprocal * (scaled - scaled.mean(-1, keepdims=True) - normed * along)
    return to_x.astype(x.dtype), (gradient * normed).sum(rows), gradient.sum(rows)


layer_norm.defvjp(_layer_norm, _layer_norm_backward)


@jax.custom_vjp
def quick_gelu(x: Array) -> Array:
    """Return `x · sigmoid(1.702 x)`, CLIP's approximation of GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


def _quick_gelu_backward(x: Array, gradient: Array) -> tuple[Array]:
    y = x.astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(1.702 * y)
    slope = sigmoid * (1 + 1.702 * y * (1 - sigmoid))
    return ((gradient * slope).astype(x.dtype),)


quick_gelu.defvjp(lambda x: (quick_gelu(x), x), _quick_gelu_backward)


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """Return the exact GELU, `x · Φ(x)`."""
    return jax.nn.gelu(x, approximate=False)


def _gelu_backward(x: Array, gradient: Array) -> tuple[Array]:
    y = x.astype(jnp.float32)
    slope = jax.scipy.stats.norm.cdf(y) + y * jax.scipy.stats.norm.pdf(y)
    return ((gradient * slope).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)
