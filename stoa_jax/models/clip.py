"""CLIP's two towers.

Shapes: N frames or texts, S side of a frame, P patches, h vision width, d shared width,
L text positions, V vocabulary.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from stoa_jax.models.config import ModelConfig
from stoa_jax.models.layers import LayerNorm, joint_frames, normal, run_blocks, stack

# CLIP's mean and standard deviation of red, green and blue, for pixels in [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class Patches(nnx.Module):
    """Linear projection of non-overlapping patches: CLIP's first convolution."""

    def __init__(self, size: int, width: int, *, rngs: nnx.Rngs):
        self.kernel = normal(rngs, (size, size, 3, width), (3 * size * size) ** -0.5)

    def __call__(self, x: Array) -> Array:
        """Project frames [N, S, S, 3] to patches [N, P, h]."""
        n, side, _, _ = x.shape
        size = self.kernel.shape[0]
        grid = side // size
        x = x.reshape(n, grid, size, grid, size, 3)
        y = jnp.einsum("nyaxbc,abch->nyxh", x, self.kernel[...].astype(x.dtype))
        return y.reshape(n, grid * grid, -1)


class VisionTower(nnx.Module):
    """The vision transformer, which encodes every frame separately."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs):
        h = c.vision_width
        self.config = c
        self.patch = Patches(c.patch_size, h, rngs=rngs)
        self.cls = normal(rngs, (h,), h**-0.5)
        self.positions = normal(rngs, (c.grid**2 + 1, h), h**-0.5)
        self.ln_pre = LayerNorm(h)
        self.blocks = stack(
            c.vision_depth,
            h,
            c.vision_heads,
            activation=c.activation,
            implementation=c.attention,
            rngs=rngs,
        )
        self.ln_post = LayerNorm(h)
        self.proj = normal(rngs, (h, c.text_width), h**-0.5)

    def __call__(
        self, pixels: Array, taps: Sequence[int] = (), *, frames: int = 1
    ) -> tuple[Array, dict[int, Array]]:
        """Return frame tokens [N, d] and the outputs of the blocks named in `taps`.

        Takes uint8 pixels [N, S, S, 3]. The second result is `{block: [N, 1 + P, h]}`, blocks
        counted from 1, before `ln_post`, [CLS] first. Every `frames` consecutive rows are one
        clip, which matters only to the last `joint_blocks`. Unless it is tapped, the last block
        computes only [CLS], the only output that is used.
        """
        c = self.config
        x = self.embed(pixels)
        out = {}
        start, joint = 0, c.vision_depth - c.joint_blocks
        for stop in sorted({*taps, joint, c.vision_depth} - {0}):
            cls_only = stop == c.vision_depth and stop not in taps
            if start < joint:
                x = run_blocks(
                    self.blocks,
                    x,
                    start=start,
                    stop=stop,
                    keep=slice(0, 1) if cls_only else None,
                    scan=c.scan_layers,
                    remat=c.remat,
                )
            else:
                x = joint_frames(
                    self.blocks,
                    x,
                    frames,
                    start=start,
                    stop=stop,
                    cls_only=cls_only,
                    scan=c.scan_layers,
                    remat=c.remat,
                )
            out[stop] = x
            start = stop
        tokens = self.ln_post(x[:, 0]) @ self.proj[...].astype(x.dtype)
        return tokens, {tap: out[tap] for tap in taps}

    def portable(self) -> "VisionTower":
        """Return a copy whose programs lower for every platform: its attention is XLA's."""
        copy = jax.tree.map(lambda x: x, self)
        copy.blocks.attention.implementation = "xla"
        return copy

    def embed(self, pixels: Array) -> Array:
        """Return the input of the first block [N, 1 + P, h], including positions and `ln_pre`."""
        x = (pixels.astype(jnp.float32) / 255.0 - jnp.array(MEAN)) / jnp.array(STD)
        x = self.patch(x.astype(self.config.dtype))
        cls = jnp.broadcast_to(self.cls[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([cls, x], 1) + self.positions[...].astype(x.dtype)
        return self.ln_pre(x)


class TextTower(nnx.Module):
    """The causal text transformer."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs):
        d = c.text_width
        self.config = c
        self.token_embedding = normal(rngs, (c.vocab_size, d), 0.02)
        self.positions = normal(rngs, (c.text_positions, d), 0.01)
        self.blocks = stack(c.text_depth, d, c.text_heads, activation=c.activation, rngs=rngs)
        self.ln_final = LayerNorm(d)
        self.proj = normal(rngs, (d, d), d**-0.5)
        # CLIP's vocabulary has no [MASK].
        learned = c.masked_text == "learned"
        self.mask_embedding = normal(rngs, (d,), 0.02) if learned else None

    def embed(self, tokens: Array, masked: Array | None = None) -> Array:
        """Return token embeddings [N, L, d] without positions; [MASK]'s where `masked` is True."""
        if masked is not None and self.mask_embedding is None:
            return self.token_embedding[...][jnp.where(masked, 0, tokens)]
        x = self.token_embedding[...][tokens]
        if masked is not None and self.mask_embedding is not None:
            x = jnp.where(masked[..., None], self.mask_embedding[...], x)
        return x

    def __call__(self, tokens: Array, masked: Array | None = None) -> Array:
        """Encode ids [N, L] to [N, L, d] in the shared space; `masked` positions read [MASK]."""
        c = self.config
        length = tokens.shape[1]
        x = (self.embed(tokens, masked) + self.positions[...][:length]).astype(c.dtype)
        causal = jnp.tril(jnp.ones((1, length, length), bool))
        x = run_blocks(self.blocks, x, causal, scan=c.scan_layers, remat=c.remat)
        return self.ln_final(x) @ self.proj[...].astype(x.dtype)

    def alone(self, tokens: Array) -> Array:
        """Encode each piece of ids [N, L] as if it were the only one of its text: [N, L, d]."""
        c = self.config
        at = jnp.arange(tokens.shape[1])
        x = self.embed(tokens) + self.positions[...][jnp.minimum(at, 1)]
        mask = jnp.eye(tokens.shape[1], dtype=bool).at[:, 0].set(True)
        x = run_blocks(
            self.blocks, x.astype(c.dtype), mask[None], scan=c.scan_layers, remat=c.remat
        )
        return self.ln_final(x) @ self.proj[...].astype(x.dtype)


def text_ends(tokens: Array, vocab_size: int) -> tuple[Array, Array]:
    """Return the position of [SEP] [N] and the mask of text positions [N, L], both ends included.

    The end token has the last id of the vocabulary.
    """
    is_end = tokens == vocab_size - 1
    # A text that was truncated without its [SEP] ends at its last position.
    last = tokens.shape[-1] - 1
    end = jnp.where(is_end.any(-1), jnp.argmax(is_end, -1), last).astype(jnp.int32)
    positions = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, tokens.ndim - 1)
    return end, positions <= end[..., None]
