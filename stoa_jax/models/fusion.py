"""The modality-agnostic encoder, and the heads on top of it.

Fusion sequence: frames·T, clip, trajectories·N, actions·A, text·L.
Shapes: B clips, S fusion places, L text places, d width, V vocabulary.
"""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from stoa_jax.models.config import ModelConfig
from stoa_jax.models.layers import Block, Linear, normal, run_blocks, stack
from stoa_jax.models.released import BilinearMatch, dropout


class FusionEncoder(nnx.Module):
    """Video, trajectories, actions and text in one sequence, bidirectional."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs):
        d = c.text_width
        self.config = c
        # Room for the longest text at any time, so that the table never changes with it.
        rows = c.fusion_position_rows or c.visual_length + c.text_positions
        self.positions = normal(rngs, (rows, d), 0.01)
        self.blocks = comparing(
            stack(c.fusion_depth, d, c.fusion_heads, activation=c.activation, rngs=rngs)
        )
        # Stands in for a masked word's text feature.
        self.mask_input = normal(rngs, (d,), 0.02) if c.masked_text == "learned" else None
        # Token embeddings are drawn at 0.02: with this, words start with a spread of about 1.
        self.lm_proj = normal(rngs, (d, d), 1 / (0.02 * d))
        self.lm_bias = nnx.Param(jnp.zeros(c.vocab_size))
        bilinear = c.match_head == "bilinear"
        self.match = (
            BilinearMatch(d, rngs=rngs) if bilinear else Linear(2 * d, 2, std=0.02, rngs=rngs)
        )
        self.answer = Linear(2 * d, c.num_answers, std=0.02, rngs=rngs) if c.num_answers else None

    def __call__(self, x: Array, mask: Array) -> Array:
        """[B, S, d] with `mask` [B, S, S], True where one may look -> [B, S, d]."""
        c = self.config
        if c.fusion_positions == "all":  # else whoever made the sequence knows which have one
            x = x + self.positions[...][: x.shape[1]].astype(x.dtype)
        return run_blocks(self.blocks, x, mask, scan=c.scan_layers, remat=c.remat)

    def lm_logits(self, x: Array, token_embedding: Array, key: Array | None = None) -> Array:
        """[..., d] -> [..., V], over the tied table of token embeddings, in float32."""
        x = dropout(x, self.config.head_dropout, key)
        x = x @ self.lm_proj[...].astype(x.dtype)
        logits = jnp.einsum(
            "...d,vd->...v", x, token_embedding.astype(x.dtype), preferred_element_type=jnp.float32
        )
        return logits + self.lm_bias[...]


def comparing(blocks: Block) -> Block:
    """Keys that start equal to queries: a place then looks first at places that are like it.

    Video and text stand in one space, so a matching pair is told from the first step; with keys of
    their own the match loss stayed at its prior (benchmarks/RESULTS.md).
    """
    kernel = blocks.attention.qkv.kernel  # [depth, h, 3, H, D]
    kernel[...] = kernel[...].at[:, :, 1].set(kernel[...][:, :, 0])
    return blocks


def fusion_mask(visual: Array, text: Array, text_attention: Array | None = None) -> Array:
    """Who may look at whom [B, S, S], from which visual [B, S - L] and text [B, L] places count.

    Without `text_attention` every place sees every valid place. With it, text sees text as it
    says [B, L, L] and all that is visual, and nothing visual sees text.
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
