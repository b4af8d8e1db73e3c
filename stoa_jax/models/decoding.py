"""The prefix language model one word at a time, with keys and values kept.

Nothing visual ever sees text, so each fusion layer's visual keys and values are made once for a
clip; the text encoder and the text side of fusion are causal, so theirs are kept as they come.

Shapes: B clips, W beams, S visual places, L text places, H heads, D head width, d width,
V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from stoa_jax.models import released
from stoa_jax.models.layers import Attention, Block, depth_of
from stoa_jax.models.stoa import Stoa, VideoFeatures


class Visual(NamedTuple):
    """What the words look at: the visual half of every fusion layer."""

    keys: Array  # [layers, B, S, H, D]
    values: Array
    mask: Array  # [B, S]


class Cache(NamedTuple):
    """Keys and values of the words so far, [layers, B, W, L, H, D]."""

    text_keys: Array
    text_values: Array
    fusion_keys: Array
    fusion_values: Array


def visual_keys(model: Stoa, video: VideoFeatures) -> Visual:
    """Runs the visual half of the fusion encoder, once for a clip."""
    if model.config.prefix_lm == "position_query":
        x, counts = released.visual_places(model, video)
        mask = jnp.broadcast_to(counts[:, None], (*counts.shape, counts.shape[1]))
    else:
        b, _, d = video.frames.shape
        no_text = jnp.zeros((b, 0, d), video.frames.dtype)
        x, mask = model.fusion_input(
            video, no_text, jnp.zeros((b, 0), bool), jnp.zeros((b, 0, 0), bool)
        )
        x = x + model.fusion.positions[...][: x.shape[1]].astype(x.dtype)

    def layer(x: Array, block: Block) -> tuple[Array, tuple[Array, Array]]:
        q, k, v = block.attention.project(block.ln_1(x))
        x = x + block.attention.attend(q, k, v, mask)
        return x + block.mlp(block.ln_2(x)), (k, v)

    _, (keys, values) = jax.lax.scan(layer, x, model.fusion.blocks)
    return Visual(keys, values, mask[:, 0])


def empty_cache(model: Stoa, clips: int, beams: int, length: int) -> Cache:
    """Room for `length` words of every beam, and for one place that only asks."""

    def room(blocks: Block) -> Array:
        _, _, _, heads, width = blocks.attention.qkv.kernel.shape
        shape = (depth_of(blocks), clips, beams, length + 1, heads, width)
        return jnp.zeros(shape, model.config.dtype)

    text, fusion = room(model.text.blocks), room(model.fusion.blocks)
    return Cache(text, text, fusion, fusion)


def next_word(
    model: Stoa, visual: Visual, cache: Cache, tokens: Array, place: Array
) -> tuple[Array, Cache]:
    """Logits [B, W, V] of what follows `tokens` [B, W], which stand at `place` of their texts."""
    text, fusion = model.text, model.fusion
    so_far = jnp.arange(cache.text_keys.shape[3]) <= place  # [L]

    x = text.embed(tokens) + text.positions[...][place]
    x, text_keys, text_values = _through(
        text.blocks,
        x.astype(model.config.dtype),
        (cache.text_keys, cache.text_values),
        place,
        so_far,
    )
    x = text.ln_final(x) @ text.proj[...].astype(x.dtype)

    positions = fusion.positions[...][visual.mask.shape[1] :].astype(x.dtype)
    x = x + positions[place]
    x, fusion_keys, fusion_values = _through(
        fusion.blocks, x, (cache.fusion_keys, cache.fusion_values), place, so_far, visual
    )
    if model.config.prefix_lm == "position_query":
        # The next word is told by its bare position, which sees all before it and is not kept.
        asks = jnp.broadcast_to(positions[place + 1], x.shape)
        kept = (fusion_keys, fusion_values)
        so_far = jnp.arange(so_far.shape[0]) <= place + 1
        x, _, _ = _through(fusion.blocks, asks, kept, place + 1, so_far, visual)
    return model.lm_logits(x), Cache(text_keys, text_values, fusion_keys, fusion_values)


def _through(
    blocks: Block,
    x: Array,
    kept: tuple[Array, Array],
    place: Array,
    so_far: Array,
    visual: Visual | None = None,
) -> tuple[Array, Array, Array]:
    """One word [B, W, d] through a stack; the kept keys and values with its own written in."""

    seen = None if visual is None else (visual.keys, visual.values)

    def layer(x: Array, one) -> tuple[Array, tuple[Array, Array]]:
        block, keys, values, pair = one
        b, w, d = x.shape
        q, k, v = block.attention.project(block.ln_1(x).reshape(b * w, 1, d))
        q, k, v = (part.reshape(b, w, 1, *part.shape[2:]) for part in (q, k, v))
        keys = jax.lax.dynamic_update_slice_in_dim(keys, k, place, 2)
        values = jax.lax.dynamic_update_slice_in_dim(values, v, place, 2)
        sights = None if pair is None else (*pair, visual.mask)
        x = x + _look(block.attention, q[:, :, 0], keys, values, so_far, sights)
        return x + block.mlp(block.ln_2(x)), (keys, values)

    x, (keys, values) = jax.lax.scan(layer, x, (blocks, *kept, seen))
    return x, keys, values


def _look(
    attention: Attention,
    q: Array,
    keys: Array,
    values: Array,
    so_far: Array,
    seen: tuple[Array, Array, Array] | None,
) -> Array:
    """Attention [B, W, d] of one query [B, W, H, D] a beam, over its own words and what it sees.

    The visual keys [B, S, H, D] are shared by the beams, and not copied for them.
    """

    def logits(equation: str, k: Array, mask: Array) -> Array:
        x = jnp.einsum(equation, q, k, preferred_element_type=jnp.float32)
        return jnp.where(mask, x * q.shape[-1] ** -0.5, -jnp.inf)

    words = logits("bwad,bwlad->bwal", keys, so_far)
    if seen is None:
        weights = jax.nn.softmax(words, -1).astype(q.dtype)
        mixed = jnp.einsum("bwal,bwlad->bwad", weights, values)
    else:
        their_keys, their_values, mask = seen
        sights = logits("bwad,bsad->bwas", their_keys, mask[:, None, None])
        weights = jax.nn.softmax(jnp.concatenate([sights, words], -1), -1).astype(q.dtype)
        count = their_keys.shape[1]
        mixed = jnp.einsum("bwas,bsad->bwad", weights[..., :count], their_values)
        mixed += jnp.einsum("bwal,bwlad->bwad", weights[..., count:], values)
    y = jnp.einsum("bwad,adh->bwh", mixed, attention.out.kernel[...].astype(mixed.dtype))
    return y + attention.out.bias[...].astype(y.dtype)
