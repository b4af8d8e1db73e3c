"""Matrix products that accumulate in float32 and whose gradients keep low-precision operands."""

import functools

import jax
import jax.numpy as jnp
from jax import Array


def einsum_float32(equation: str, x: Array, y: Array) -> Array:
    """Return the einsum of two arrays in float32, with the gradient rounded to their dtype.

    Without the rounding, the backward pass multiplies a float32 gradient by a bfloat16 operand,
    which is slow on a GPU. `equation` is "a,b->c" with an explicit result.
    """
    return _einsum(equation, x, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _einsum(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _forward(equation: str, x: Array, y: Array) -> tuple[Array, tuple[Array, Array]]:
    return _einsum(equation, x, y), (x, y)


def _backward(equation: str, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, y = saved
    inputs, result = equation.split("->")
    left, right = inputs.split(",")
    gradient = gradient.astype(x.dtype)
    to_x = jnp.einsum(f"{result},{right}->{left}", gradient, y)
    to_y = jnp.einsum(f"{result},{left}->{right}", gradient, x)
    return to_x.astype(x.dtype), to_y.astype(y.dtype)


_einsum.defvjp(_forward, _backward)
