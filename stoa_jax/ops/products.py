"""Matrix products whose gradients are fast: low-precision operands, and flat ones on a CPU."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax


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


def project(x: Array, kernel: Array, axes: int = 1) -> Array:
    """Contract the last `axes` axes of `x` with the first ones of `kernel`.

    On a CPU the backward pass multiplies matrices, because XLA copies operands that are contracted
    over several axes.
    """
    return _project(x, kernel, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _project(x: Array, kernel: Array, axes: int) -> Array:
    return jnp.tensordot(x, kernel, axes)


def _project_forward(x: Array, kernel: Array, axes: int) -> tuple[Array, tuple[Array, Array]]:
    return _project(x, kernel, axes), (x, kernel)


def _project_backward(
    axes: int, saved: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    return lax.platform_dependent(
        *saved,
        gradient,
        cpu=functools.partial(_project_gradients_flat, axes),
        default=functools.partial(_project_gradients, axes),
    )


_project.defvjp(_project_forward, _project_backward)


def _project_gradients(axes: int, x: Array, kernel: Array, gradient: Array) -> tuple[Array, Array]:
    rows = x.ndim - axes  # the axes of `x` that remain
    last = list(range(rows, gradient.ndim)), list(range(axes, kernel.ndim))
    first = list(range(rows))
    return jnp.tensordot(gradient, kernel, last), jnp.tensordot(x, gradient, (first, first))


def _project_gradients_flat(
    axes: int, x: Array, kernel: Array, gradient: Array
) -> tuple[Array, Array]:
    n, inner = math.prod(x.shape[: x.ndim - axes]), math.prod(kernel.shape[:axes])
    flat_x, flat_kernel = x.reshape(n, inner), kernel.reshape(inner, -1)
    flat = gradient.reshape(n, -1)
    to_x, to_kernel = flat @ flat_kernel.T, flat_x.T @ flat
    return to_x.reshape(x.shape), to_kernel.reshape(kernel.shape)
