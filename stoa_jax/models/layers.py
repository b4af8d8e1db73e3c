"""Transformer layers as plain pytrees: parameters in float32, computation in the input's dtype.

Shapes: N rows, S positions, Q positions that are kept, h width, H heads, D head width.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from stoa_jax import ops

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": ops.quick_gelu,
    "gelu": ops.gelu,
}
# What `remat="products"` keeps of a block: results of products, from which the rest is elementwise
# (and the attention weights one product).
PRODUCTS = ("queries", "keys", "values", "attended", "residual", "expanded")

GPUS = ("gpu", "cuda", "rocm")

Keep = slice | Array  # positions: a slice of them, or indices [N, Q]


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
        y = ops.project(x, self.kernel[...].astype(x.dtype))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation of the last axis, computed in float32."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Array) -> Array:
        """Normalise `x`; the result has the dtype of the input."""
        return ops.layer_norm(x, self.scale[...], self.bias[...])


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
        expanded = checkpoint_name(self.up(x), "expanded")
        return self.down(ACTIVATIONS[self.activation](expanded))


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

    def project(self, x: Array, keep: Keep | None = None) -> tuple[Array, Array, Array]:
        """Return queries (only of positions `keep`), keys and values, each [..., S, H, D]."""
        kernel = self.qkv.kernel[...].astype(x.dtype)
        bias = self.qkv.bias[...].astype(x.dtype)
        if keep is None:
            q, k, v = _parts(ops.project(x, kernel) + bias)
        else:
            q = ops.project(take_positions(x, keep), kernel[:, 0]) + bias[0]
            k, v = _parts(ops.project(x, kernel[:, 1:]) + bias[1:])
        return (
            checkpoint_name(q, "queries"),
            checkpoint_name(k, "keys"),
            checkpoint_name(v, "values"),
        )

    def attend(self, q: Array, k: Array, v: Array, mask: Array | None) -> Array:
        """Attend from queries to keys and values where `mask` [..., S, S'] is True."""
        # cuDNN turns a boolean mask into a bias of full size, which is slower than XLA.
        implementation = "xla"
        if mask is None and q.shape[-3] == k.shape[-3]:
            length, heads, width = q.shape[-3:]
            implementation = ops.choose_attention(
                self.implementation, dtype=q.dtype, heads=heads, head_width=width, length=length
            )

        if implementation == "cudnn":
            x = ops.cudnn_attention(q, k, v)
        else:
            x = ops.attention(q, k, v, mask)
        x = checkpoint_name(x, "attended")
        y = ops.project(x, self.out.kernel[...].astype(x.dtype), 2)
        return y + self.out.bias[...].astype(x.dtype)


def _parts(x: Array) -> list[Array]:
    """Split [..., C, H, D] into C arrays [..., H, D]; their gradients are concatenated."""
    axis = x.ndim - 3
    return [part.squeeze(axis) for part in jax.lax.split(x, [1] * x.shape[axis], axis=axis)]


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

    def __call__(self, x: Array, mask: Array | None = None, keep: Keep | None = None) -> Array:
        """Apply the block to `x` [..., S, h], attending where `mask` [..., S, S] is True.

        A mask [1, S, S] holds for all N rows of `x` [N, S, h]. With `keep`, only the outputs at
        these positions are computed, [N, Q, h]; every position still serves as key and value.
        """
        projected = self.attention.project(self.ln_1(x), keep)
        if keep is not None:
            x = take_positions(x, keep)
            mask = None if mask is None else take_rows(mask, keep)
        x = checkpoint_name(x + self.attention.attend(*projected, mask), "residual")
        return x + self.mlp(self.ln_2(x))


def take_positions(x: Array, keep: Keep) -> Array:
    """Return the positions `keep` of `x` [N, S, ...]: [N, Q, ...].

    Indices select by a product with a one-hot matrix, because a gather does not shard over rows.
    """
    if isinstance(keep, slice):
        return x[:, keep]
    onehot = jax.nn.one_hot(keep, x.shape[1], dtype=x.dtype)
    # Default precision would round float32 values on a GPU or TPU.
    return jnp.einsum("nqs,ns...->nq...", onehot, x, precision=jax.lax.Precision.HIGHEST)


def take_rows(mask: Array, keep: Keep) -> Array:
    """Return the rows `keep` of an attention mask [N or 1, S, S']: [N or 1, Q, S']."""
    if isinstance(keep, slice):
        return mask[:, keep]
    mask = jnp.broadcast_to(mask, (keep.shape[0], *mask.shape[1:]))
    return take_positions(mask.astype(jnp.float32), keep) > 0


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
    keep: Keep | None = None,
    scan: bool | None = None,
    remat: str = "none",
) -> Array:
    """Apply blocks `start` to `stop` of a stack to `x` [..., S, h].

    With `keep`, the last of these blocks computes only the outputs at these positions, [N, Q, h].
    `scan` (a loop, or unrolled; None: by platform) and `remat` (recomputation in the backward pass)
    change compile time, speed and memory, not the result.
    """
    stop = depth_of(blocks) if stop is None else stop
    if keep is not None and stop == start:
        return take_positions(x, keep)
    last = stop if keep is None else stop - 1

    def step(x: Array, block: Block, keep: Keep | None = None) -> Array:
        return block(x, mask, keep)

    run = rematerialised(step, remat)
    if (loop_over_layers() if scan is None else scan) and last - start > 1:
        chosen = block_slice(blocks, slice(start, last))
        x = jax.lax.scan(lambda x, block: (run(x, block), None), x, chosen)[0]
    else:
        for i in range(start, last):
            x = run(x, block_slice(blocks, i))
    if keep is None:
        return x
    final = rematerialised(partial(step, keep=keep), remat)
    return final(x, block_slice(blocks, last))


def rematerialised(step: Callable[..., Array], remat: str) -> Callable[..., Array]:
    """Return `step` with the recomputation that `config.remat` names."""
    policies = {
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "products": jax.checkpoint_policies.save_only_these_names(*PRODUCTS),
        "full": None,
    }
    return step if remat == "none" else jax.checkpoint(step, policy=policies[remat])


def loop_over_layers(platform: str | None = None) -> bool:
    """Return whether layers run in a loop by default: everywhere but on a GPU.

    A loop compiles faster; on a GPU unrolled layers run 1.4 times as fast.
    """
    return (platform or jax.default_backend()) not in GPUS


def joint_frames(
    blocks: Block,
    x: Array,
    frames: int,
    *,
    start: int,
    stop: int,
    cls_only: bool,
    scan: bool | None,
    remat: str,
) -> Array:
    """Apply blocks in which all positions of a clip attend to each other.

    `x` [B·T, 1 + P, h] holds the T = `frames` frames of each clip one after another. These are the
    last `config.joint_blocks` of the video encoder. With `cls_only`, the last block computes only
    the first position of every frame: [B·T, 1, h].
    """
    n, positions, h = x.shape
    keep = slice(None, None, positions) if cls_only else None
    x = x.reshape(-1, frames * positions, h)
    x = run_blocks(blocks, x, start=start, stop=stop, keep=keep, scan=scan, remat=remat)
    return x.reshape(n, -1, h)


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zero entries with probability `rate` and scale the others up; without a key, return `x`."""
    if key is None or not rate:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def unit(x: Array) -> Array:
    """Scale the last axis to length 1, in float32; a zero vector stays zero."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-12))
