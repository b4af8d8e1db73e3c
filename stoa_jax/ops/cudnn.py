"""Attention without a mask by cuDNN, and the choice between it and XLA.

Shapes: N rows, S positions, H heads, D head width.
"""

import concurrent.futures
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import Array
from jax.typing import DTypeLike

from stoa_jax.errors import UserError
from stoa_jax.ops.attention import attention

Implementation = Literal["xla", "cudnn"]

OLDEST = (8, 0)  # compute capability of cuDNN's flash attention
HOPPER = (9, 0)
TOLERANCE = 0.05  # share of the largest entry; bfloat16 rounds to 0.004


def cudnn_length(length: int) -> int:
    """Return the length that `cudnn_attention` pads to: a multiple of 8 that cuDNN can train.

    cuDNN 9 refuses odd lengths in training, and its gradient with lengths is NaN where the padded
    length is 64 modulo 128.
    """
    padded = -(-length // 8) * 8
    return padded + 8 if padded % 128 == 64 else padded


def cudnn_attention(
    q: Array, k: Array, v: Array, *, implementation: Implementation = "cudnn"
) -> Array:
    """Attend without a mask from all positions to all, by cuDNN, on a GPU and in bfloat16 only.

    Queries, keys and values are [N, S, H, D]; they are padded, and cuDNN is told their true length.
    `implementation="xla"` makes the same padded call without cuDNN.
    """
    n, length = q.shape[:2]
    pad = ((0, 0), (0, cudnn_length(length) - length), (0, 0), (0, 0))
    lengths = jnp.full((n,), length, jnp.int32)
    x = jax.nn.dot_product_attention(
        *(jnp.pad(part, pad) for part in (q, k, v)),
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    return x[:, :length]


def choose_attention(
    requested: str, *, dtype: DTypeLike, heads: int, head_width: int, length: int | None = None
) -> Implementation:
    """Return the implementation for `model.attention` on the default device: "xla" or "cudnn".

    "auto" takes cuDNN where it can run, and logs once why a GPU does without it. "cudnn" raises
    UserError where it cannot run. With a `length`, a small attention of that length must also
    compile and agree with XLA's.
    """
    if requested == "xla":
        return "xla"
    platform, capability = _device()
    obstacle = cudnn_obstacle(platform, capability, dtype=dtype, head_width=head_width)
    if obstacle is None and length is not None:
        obstacle = _failed_trial(length, heads, head_width, jnp.dtype(dtype).name)
    if obstacle is None:
        return "cudnn"
    if requested == "cudnn":
        raise UserError(f"config.model.attention: 'cudnn' cannot run here: {obstacle}")
    if platform == "gpu":
        _log_once(obstacle)
    return "xla"


def cudnn_obstacle(
    platform: str, capability: str | None, *, dtype: DTypeLike, head_width: int
) -> str | None:
    """Return why cuDNN's attention cannot run, and what to do about it; None if it can."""
    other = "or model.attention=auto"
    version = _version(capability)
    if platform != "gpu" or version is None:
        return f"the platform is {platform!r} and not an NVIDIA GPU; set model.attention=auto"
    if version < OLDEST:
        return (
            f"the GPU has compute capability {capability} and cuDNN needs 8.0; "
            "set model.attention=auto"
        )
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return (
            f"the dtype is {jnp.dtype(dtype).name} and cuDNN needs bfloat16; "
            f"set model.dtype=bfloat16 {other}"
        )
    widest = 256 if version >= HOPPER else 128
    if head_width % 8 or head_width > widest:
        return (
            f"the head width is {head_width} and cuDNN needs a multiple of 8 up to {widest}; "
            f"change model.vision_heads {other}"
        )
    return None


def _version(capability: str | None) -> tuple[int, int] | None:
    """Parse a compute capability such as "9.0"; None for other devices (AMD's are "gfx942")."""
    major, dot, minor = (capability or "").partition(".")
    return (int(major), int(minor)) if dot and major.isdigit() and minor.isdigit() else None


def _device() -> tuple[str, str | None]:
    """Return platform and compute capability of the default device."""
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    device = default or jax.local_devices()[0]
    if isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    return device.platform, getattr(device, "compute_capability", None)


@functools.cache
def _log_once(obstacle: str) -> None:
    logging.info("attention: by XLA instead of cuDNN, because %s", obstacle)


@functools.cache
def _failed_trial(length: int, heads: int, head_width: int, dtype: str) -> str | None:
    """Run one row forward and backward; return what is wrong with it, or None.

    A model is traced while this is asked. Another thread has no part in that trace.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(trial, cudnn_attention, length, heads, head_width, dtype).result()


def trial(candidate, length: int, heads: int, head_width: int, dtype: str) -> str | None:
    """Compare `candidate` with XLA's attention, values and gradients; return what is wrong."""
    rng = np.random.default_rng(0)
    shape = (1, length, heads, head_width)
    inputs = [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(4)]

    def run(attend):
        def both(q, k, v, gradient):
            x, backward = jax.vjp(attend, q, k, v)
            return (x, *backward(gradient))

        return [np.asarray(x, np.float32) for x in jax.jit(both)(*inputs)]

    shown = f"a trial of length {length}, {heads} heads of {head_width} in {dtype}"
    advice = "set model.attention=xla"
    try:
        found = run(candidate)
    except Exception as error:  # jax, XLA and cuDNN have no common base class
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        return f"{shown} failed ({reason}); {advice}"
    for name, a, b in zip(("values", "dq", "dk", "dv"), found, run(attention), strict=True):
        difference = np.abs(a - b).max() / np.abs(b).max()
        if not difference <= TOLERANCE:  # NaN too
            return f"{shown} is off in {name} by {difference:.3g} of the largest entry; {advice}"
    return None
