"""Transformer layers as plain pytrees: parameters in float32, computation in the input's dtype.

Shapes: N rows, S positions, h width, H heads, D head width.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> nnx.Param:
    """Return a parameter initialised from N(0, std²)."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))


class Linear(nnx.Module):
    """Affine map `x · kernel + bias` of the last axis."""

    def __init__(self, d_in: int, d_out: int, *, std: float, bias: bool = True, rngs: nnx.Rngs):
        self.kernel = normal(rngs, (d_in, d_out), std)
        self.bias = nnx.Param(jnp.zeros(d_out)) if bias else None

    def __call__(self, x: Array) -> Array:
        """Map [..., d_in] to [..., d_out]."""
        y = x @ self.kernel[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation of the last axis, computed in float32."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Array) -> Array:
        """Normalise `x`; the result has the dtype of the input."""
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-5)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class Mlp(nnx.Module):
    """Two linear layers with an activation between them."""

    def __init__(
        self,
        d_in: int,
        hidden: int,
        d_out: int,
        *,
        activation: str = "gelu",
        stds: tuple[float, float] | None = None,
        rngs: nnx.Rngs,
    ):
        up, down = stds or (d_in**-0.5, hidden**-0.5)
        self.up = Linear(d_in, hidden, std=up, rngs=rngs)
        self.down = Linear(hidden, d_out, std=down, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Array) -> Array:
        """Map [..., d_in] to [..., d_out]."""
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


class Heads(nnx.Module):
    """Query, key and value projections in one kernel [h, 3, H, D] and one bias."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.kernel = normal(rngs, (width, 3, heads, width // heads), width**-0.5)
        self.bias = nnx.Param(jnp.zeros((3, heads, width // heads)))


class Merge(nnx.Module):
    """Output projection of the heads: kernel [H, D, h] and bias."""

    def __init__(self, width: int, heads: int, *, std: float, rngs: nnx.Rngs):
        self.kernel = normal(rngs, (heads, width // heads, width), std)
        self.bias = nnx.Param(jnp.zeros(width))


class Attention(nnx.Module):
    """Multi-head self-attention; `project` and `attend` are separate so that decoders can cache."""

    def __init__(
        self, width: int, heads: int, *, out_std: float, implementation: str, rngs: nnx.Rngs
    ):
        self.qkv = Heads(width, heads, rngs=rngs)
        self.out = Merge(width, heads, std=out_std, rngs=rngs)
        self.implementation = implementation

    def project(self, x: Array) -> tuple[Array, Array, Array]:
        """Return queries, keys and values, each [N, S, H, D]."""
        qkv = jnp.einsum("nsh,hcad->cnsad", x, self.qkv.kernel[...].astype(x.dtype))
        q, k, v = qkv + self.qkv.bias[...].astype(x.dtype)[:, None, None]
        return q, k, v

    def attend(self, q: Array, k: Array, v: Array, mask: Array | None) -> Array:
        """Attend from queries to keys and values where `mask` [N or 1, S, S'] is True."""
        # cuDNN turns a boolean mask into a bias of full size, which is slower than XLA.
        fused = self.implementation == "cudnn" and mask is None and q.dtype != jnp.float32
        x = jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=None if mask is None else mask[:, None],
            implementation="cudnn" if fused else "xla",
        )
        y = jnp.einsum("nsad,adh->nsh", x, self.out.kernel[...].astype(x.dtype))
        return y + self.out.bias[...].astype(x.dtype)

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Attend within `x` [N, S, h] where `mask` [N or 1, S, S] is True."""
        return self.attend(*self.project(x), mask)


class Block(nnx.Module):
    """Pre-norm transformer block, as in CLIP."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        depth: int,
        activation: str,
        implementation: str = "xla",
        rngs: nnx.Rngs,
    ):
        # As in CLIP, residual branches start smaller in deeper stacks.
        branch = width**-0.5 * (2 * depth) ** -0.5
        self.ln_1 = LayerNorm(width)
        self.attention = Attention(
            width, heads, out_std=branch, implementation=implementation, rngs=rngs
        )
        self.ln_2 = LayerNorm(width)
        self.mlp = Mlp(
            width,
            4 * width,
            width,
            activation=activation,
            stds=((2 * width) ** -0.5, branch),
            rngs=rngs,
        )

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Apply the block to `x` [N, S, h], attending where `mask` [N or 1, S, S] is True."""
        x = x + self.attention(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


def stack(depth: int, width: int, heads: int, *, rngs: nnx.Rngs, **kwargs) -> Block:
    """Return `depth` blocks as one module whose parameters have a leading depth axis."""

    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key: Array) -> Block:
        return Block(width, heads, depth=depth, rngs=nnx.Rngs(params=key), **kwargs)

    return make(jax.random.split(rngs.params(), depth))


def depth_of(blocks: Block) -> int:
    """Return the number of blocks in a stack."""
    return blocks.ln_1.scale.shape[0]


def block_slice(blocks: Block, which: int | slice) -> Block:
    """Return one block of a stack (an index) or a shorter stack (a slice)."""
    return jax.tree.map(lambda p: p[which], blocks)


def run_blocks(
    blocks: Block,
    x: Array,
    mask: Array | None = None,
    *,
    start: int = 0,
    stop: int | None = None,
    scan: bool = True,
    remat: str = "none",
) -> Array:
    """Apply blocks `start` to `stop` of a stack to `x` [N, S, h].

    `scan` (loop or unrolled) and `remat` (recomputation in the backward pass) change compile time,
    speed and memory, not the result.
    """
    stop = depth_of(blocks) if stop is None else stop

    def step(x: Array, block: Block) -> Array:
        return block(x, mask)

    if remat != "none":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        step = jax.checkpoint(step, policy=policy if remat == "dots" else None)
    if scan and stop - start > 1:
        chosen = block_slice(blocks, slice(start, stop))
        return jax.lax.scan(lambda x, block: (step(x, block), None), x, chosen)[0]
    for i in range(start, stop):
        x = step(x, block_slice(blocks, i))
    return x


def joint_frames(
    blocks: Block, x: Array, frames: int, *, start: int, stop: int, scan: bool, remat: str
) -> Array:
    """Apply blocks in which all positions of a clip attend to each other.

    `x` [B·T, 1 + P, h] holds the T = `frames` frames of each clip one after another. These are the
    last `config.joint_blocks` of the video encoder.
    """
    n, positions, h = x.shape
    x = x.reshape(-1, frames * positions, h)
    x = run_blocks(blocks, x, start=start, stop=stop, scan=scan, remat=remat)
    return x.reshape(n, positions, h)


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zero entries with probability `rate` and scale the others up; without a key, return `x`."""
    if key is None or not rate:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def unit(x: Array) -> Array:
    """Scale the last axis to length 1, in float32; a zero vector stays zero."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-12))
