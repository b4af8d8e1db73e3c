"""One decoding step of the prefix language model, with cached keys and values.

No visual position attends to text, so the visual keys and values of each fusion layer are computed
once per clip. The text encoder and the text part of fusion are causal, so their keys and values are
cached token by token.

Shapes: B clips, W beams, S visual positions, L text positions, H heads, D head width, d width,
V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from stoa_jax.models import released
from stoa_jax.models.features import VideoFeatures
from stoa_jax.models.layers import Attention, Block, depth_of
from stoa_jax.models.stoa import Stoa


class Visual(NamedTuple):
    """Keys and values of the visual positions of every fusion layer."""

    keys: Array  # [layers, B, S, H, D]
    values: Array
    mask: Array  # [B, S]


class Cache(NamedTuple):
    """Keys and values of the tokens so far, [layers, B, W, L, H, D]."""

    text_keys: Array
    text_values: Array
    fusion_keys: Array
    fusion_values: Array


def visual_keys(model: Stoa, video: VideoFeatures) -> Visual:
    """Run the visual positions through the fusion encoder, once per clip."""
    if model.config.prefix_lm == "position_query":
        x, valid = released.visual_sequence(model.fusion.position_table(), video)
        mask = jnp.broadcast_to(valid[:, None], (*valid.shape, valid.shape[1]))
    else:
        b, _, d = video.frames.shape
        no_text = jnp.zeros((b, 0, d), video.frames.dtype)
        x, mask = model.fusion_input(
            video, no_text, jnp.zeros((b, 0), bool), jnp.zeros((b, 0, 0), bool)
        )
        x = x + model.fusion.position_table()[: x.shape[1]].astype(x.dtype)

    def layer(x: Array, block: Block) -> tuple[Array, tuple[Array, Array]]:
        q, k, v = block.attention.project(block.ln_1(x))
        x = x + block.attention.attend(q, k, v, mask)
        return x + block.mlp(block.ln_2(x)), (k, v)

    _, (keys, values) = jax.lax.scan(layer, x, model.fusion.blocks)
    return Visual(keys, values, mask[:, 0])


def empty_cache(model: Stoa, clips: int, beams: int, length: int) -> Cache:
    """Return a zero cache for `length` tokens of every beam, plus one position for a bare query."""

    def zeros(blocks: Block) -> Array:
        _, _, _, heads, width = blocks.attention.qkv.kernel.shape
        shape = (depth_of(blocks), clips, beams, length + 1, heads, width)
        return jnp.zeros(shape, model.config.dtype)

    text, fusion = zeros(model.text.blocks), zeros(model.fusion.blocks)
    return Cache(text, text, fusion, fusion)


def next_word(
    model: Stoa, visual: Visual, cache: Cache, tokens: Array, position: Array
) -> tuple[Array, Cache]:
    """Return logits [B, W, V] of the token after `tokens` [B, W], and the extended cache.

    `tokens` stand at index `position` of their texts.
    """
    text, fusion = model.text, model.fusion
    so_far = jnp.arange(cache.text_keys.shape[3]) <= position  # [L]

    x = text.embed(tokens) + text.positions[...][position]
    x, text_keys, text_values = _run_cached(
        text.blocks,
        x.astype(model.config.dtype),
        (cache.text_keys, cache.text_values),
        position,
        so_far,
    )
    x = text.ln_final(x) @ text.proj[...].astype(x.dtype)

    positions = fusion.position_table()[visual.mask.shape[1] :].astype(x.dtype)
    x = x + positions[position]
    x, fusion_keys, fusion_values = _run_cached(
        fusion.blocks, x, (cache.fusion_keys, cache.fusion_values), position, so_far, visual
    )
    if model.config.prefix_lm == "position_query":
        # The next token is predicted from its bare position, which attends to all tokens before it
        # and is not cached.
        query = jnp.broadcast_to(positions[position + 1], x.shape)
        cached = (fusion_keys, fusion_values)
        so_far = jnp.arange(so_far.shape[0]) <= position + 1
        x, _, _ = _run_cached(fusion.blocks, query, cached, position + 1, so_far, visual)
    return model.lm_logits(x), Cache(text_keys, text_values, fusion_keys, fusion_values)


def _run_cached(
    blocks: Block,
    x: Array,
    cached: tuple[Array, Array],
    position: Array,
    so_far: Array,
    visual: Visual | None = None,
) -> tuple[Array, Array, Array]:
    """Run one token [B, W, d] through a stack; also return the keys and values with its own."""
    visual_pair = None if visual is None else (visual.keys, visual.values)

    def layer(x: Array, inputs) -> tuple[Array, tuple[Array, Array]]:
        block, keys, values, pair = inputs
        b, w, d = x.shape
        q, k, v = block.attention.project(block.ln_1(x).reshape(b * w, 1, d))
        q, k, v = (part.reshape(b, w, 1, *part.shape[2:]) for part in (q, k, v))
        keys = jax.lax.dynamic_update_slice_in_dim(keys, k, position, 2)
        values = jax.lax.dynamic_update_slice_in_dim(values, v, position, 2)
        seen = None if visual is None else (*pair, visual.mask)
        x = x + _attend(block.attention, q[:, :, 0], keys, values, so_far, seen)
        return x + block.mlp(block.ln_2(x)), (keys, values)

    x, (keys, values) = jax.lax.scan(layer, x, (blocks, *cached, visual_pair))
    return x, keys, values


def _attend(
    attention: Attention,
    q: Array,
    keys: Array,
    values: Array,
    so_far: Array,
    seen: tuple[Array, Array, Array] | None,
) -> Array:
    """Attend from one query [B, W, H, D] per beam to its own tokens and the visual ones: [B, W, d].

    `seen` holds the visual keys and values [B, S, H, D] and mask [B, S], which all beams of a clip
    share without copies.
    """

    def logits(equation: str, k: Array, mask: Array) -> Array:
        x = jnp.einsum(equation, q, k, preferred_element_type=jnp.float32)
        return jnp.where(mask, x * q.shape[-1] ** -0.5, -jnp.inf)

    words = logits("bwad,bwlad->bwal", keys, so_far)
    if seen is None:
        weights = jax.nn.softmax(words, -1).astype(q.dtype)
        mixed = jnp.einsum("bwal,bwlad->bwad", weights, values)
    else:
        visual_keys, visual_values, mask = seen
        visual = logits("bwad,bsad->bwas", visual_keys, mask[:, None, None])
        weights = jax.nn.softmax(jnp.concatenate([visual, words], -1), -1).astype(q.dtype)
        count = visual_keys.shape[1]
        mixed = jnp.einsum("bwas,bsad->bwad", weights[..., :count], visual_values)
        mixed += jnp.einsum("bwal,bwlad->bwad", weights[..., count:], values)
    y = jnp.einsum("bwad,adh->bwh", mixed, attention.out.kernel[...].astype(mixed.dtype))
    return y + attention.out.bias[...].astype(y.dtype)
