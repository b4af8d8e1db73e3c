"""The modality-agnostic encoder and the heads on top of it.

The fusion sequence is T frames, the clip token, N trajectories, A actions, L text positions.
Shapes: B clips, S fusion positions, Q positions whose outputs are read, L text positions, d width,
V vocabulary.
"""

from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
from flax import nnx
from jax import Array

from stoa_jax import ops
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.layers import (
    Block,
    Linear,
    depth_of,
    dropout,
    normal,
    run_blocks,
    stack,
)
from stoa_jax.models.released import BilinearMatch


class FusionEncoder(nnx.Module):
    """Transformer over video, trajectories, actions and text in one sequence."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs):
        d = c.text_width
        self.config = c
        # Rows for the longest possible text, so that the table does not depend on `text_length`.
        # CLIP provides the first ones; the others are new and learn at another rate.
        self.positions = normal(rngs, (c.fusion_position_rows or c.text_positions, d), 0.01)
        new_rows = 0 if c.fusion_position_rows else c.visual_length
        self.more_positions = normal(rngs, (new_rows, d), 0.01) if new_rows else None
        self.blocks = tie_keys_to_queries(
            stack(c.fusion_depth, d, c.fusion_heads, activation=c.activation, rngs=rngs)
        )
        # Token embeddings start at 0.02: with this scale the logits start with a spread of about 1.
        self.lm_proj = normal(rngs, (d, d), 1 / (0.02 * d))
        self.lm_bias = nnx.Param(jnp.zeros(c.vocab_size))
        bilinear = c.match_head == "bilinear"
        self.match = (
            BilinearMatch(d, rngs=rngs) if bilinear else Linear(2 * d, 2, std=0.02, rngs=rngs)
        )
        self.answer = Linear(2 * d, c.num_answers, std=0.02, rngs=rngs) if c.num_answers else None

    def __call__(self, x: Array, mask: Array, reads: Sequence[Array]) -> list[Array]:
        """Encode several sequences and return the outputs that are read of each, [B, Q, d].

        `x` is [B, passes, S, d] and `mask` [B, passes, S, S], True where a position may attend.
        `reads` holds the positions [B, Q] of each pass whose outputs are needed. The last layer
        computes no others.
        """
        c = self.config
        if c.fusion_positions == "all":  # otherwise `x` already contains them
            x = x + self.position_table()[: x.shape[2]].astype(x.dtype)
        depth = depth_of(self.blocks)
        run = partial(run_blocks, self.blocks, scan=c.scan_layers, remat=c.remat)
        # Clips come before passes, so that merging the two keeps the clips of a device there.
        rows = run(_merged(x), _merged(mask), stop=depth - 1)
        x = rows.reshape(x.shape)
        return [
            run(x[:, i], mask[:, i], start=depth - 1, keep=read) for i, read in enumerate(reads)
        ]

    def position_table(self) -> Array:
        """Return all positions [rows, d]: CLIP's, then the new ones."""
        if self.more_positions is None:
            return self.positions[...]
        return jnp.concatenate([self.positions[...], self.more_positions[...]])

    def lm_logits(
        self,
        x: Array,
        token_embedding: Array,
        key: Array | None = None,
        words: Array | None = None,
    ) -> Array:
        """Return float32 logits [..., V] of features [..., d], tied to the token embeddings.

        With `words` [W], return the logits [..., W] of these ids alone.
        """
        bias = self.lm_bias[...]
        if words is not None:
            token_embedding, bias = token_embedding[words], bias[words]
        x = dropout(x, self.config.head_dropout, key)
        x = x @ self.lm_proj[...].astype(x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        logits = ops.einsum_float32("nd,vd->nv", rows, token_embedding.astype(x.dtype))
        return logits.reshape(*x.shape[:-1], -1) + bias


def _merged(x: Array) -> Array:
    return x.reshape(-1, *x.shape[2:])


def tie_keys_to_queries(blocks: Block) -> Block:
    """Initialise keys equal to queries, so that similar positions attend to each other.

    Video and text share one space, so the encoder recognises a matching pair from the first step.
    With independent keys the match loss stayed at its prior (benchmarks/notes/motion.md).
    """
    kernel = blocks.attention.qkv.kernel  # [depth, h, 3, H, D]
    kernel[...] = kernel[...].at[:, :, 1].set(kernel[...][:, :, 0])
    return blocks


def fusion_mask(visual: Array, text: Array, text_attention: Array | None = None) -> Array:
    """Return the attention mask [B, S, S] of the fusion sequence.

    `visual` [B, S - L] and `text` [B, L] say which positions are valid. Without `text_attention`
    every position attends to every valid one. With it, text attends to text as it says [B, L, L]
    and to every visual position, and no visual position attends to text.
    """
    b, v = visual.shape
    length = text.shape[1]
    if text_attention is None:
        valid = jnp.concatenate([visual, text], 1)
        return jnp.broadcast_to(valid[:, None], (b, v + length, v + length))
    to_visual = jnp.broadcast_to(visual[:, None], (b, v + length, v))
    visual_to_text = jnp.zeros((b, v, length), bool)
    text_to_text = text_attention & text[:, None]
    return jnp.concatenate([to_visual, jnp.concatenate([visual_to_text, text_to_text], 1)], 2)
