"""The compiled functions of a model, as pure functions of arrays.

All models of one configuration share them, so that a second model compiles nothing.
Shapes: B clips or texts, T frames, S side, L text positions, R pairs, d shared width, M pieces,
C answers, V vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from stoa_jax import decode, objectives
from stoa_jax.models import decoding
from stoa_jax.models.clip import TextTower, VisionTower, text_ends
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.features import TextFeatures, VideoFeatures
from stoa_jax.models.layers import unit
from stoa_jax.models.stoa import Stoa, at_position


class Towers(nnx.Module):
    """The two towers alone, which suffice for retrieval by cosine similarity."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs):
        self.visual = VisionTower(c, rngs=rngs)
        self.text = TextTower(c, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.zeros(()))


def frame_tokens(model: Towers | Stoa, pixels: Array) -> Array:
    """Return frame tokens [B, T, d] of uint8 pixels [B, T, S, S, 3]."""
    b, t = pixels.shape[:2]
    frames, _ = model.visual(pixels.reshape(b * t, *pixels.shape[2:]), frames=t)
    return frames.reshape(b, t, -1)


def video_embedding(model: Towers | Stoa, pixels: Array) -> Array:
    """Return unit vectors [B, d]: the mean of the unit frame tokens."""
    return unit(unit(frame_tokens(model, pixels)).mean(1))


def text_embedding(model: Towers | Stoa, tokens: Array) -> Array:
    """Return unit vectors [B, d] of ids [B, L]: the output at the end token."""
    end, _ = text_ends(tokens, model.text.config.vocab_size)
    return unit(at_position(model.text(tokens), end))


run_frame_tokens = jax.jit(frame_tokens)
run_text_embedding = jax.jit(text_embedding)


@jax.jit
def video_features(
    model: Stoa, pixels: Array, boxes: Array, classes: Array, scores: Array
) -> VideoFeatures:
    """Return everything that the fusion encoder reads of a batch of clips."""
    return model.encode_video(pixels, boxes, classes, scores)


@jax.jit
def text_features(model: Stoa, tokens: Array) -> TextFeatures:
    """Return everything that the fusion encoder reads of ids [B, L]."""
    return model.encode_text(tokens)


@jax.jit
def fuse_pairs(model: Stoa, video: VideoFeatures, text: TextFeatures) -> tuple[Array, Array]:
    """Return the fused outputs [R, d] of R pairs at the clip's position and at [SEP]."""
    pair = model.pair(video, text)
    return pair[:, 0], pair[:, 1]


@jax.jit
def match_logits(model: Stoa, cls: Array, sep: Array) -> Array:
    """Return match logits [R, 2] of `fuse_pairs`; with `released`, rows affect each other."""
    return model.match_logits(jnp.stack([cls, sep], 1))


@jax.jit
def answer_logits(model: Stoa, video: VideoFeatures, text: TextFeatures) -> Array:
    """Return logits [R, C] over the answers, or [R, V] over first pieces in `released`."""
    if model.config.answer_head == "first_piece":
        return model.first_piece_logits(video, text)
    return model.answer_logits(model.pair(video, text))


class Alignments(NamedTuple):
    """The words that the tokens of a batch are matched to: a text position, -1 for none."""

    trajectories: Array  # [B, N]
    trajectory_scores: Array  # [B, N, L]
    actions: Array  # [B, A]
    action_scores: Array  # [B, A, L]


@jax.jit
def align_words(
    model: Stoa, video: VideoFeatures, text: TextFeatures, tokens: Array, nouns: Array, verbs: Array
) -> Alignments:
    """Match trajectories to nouns and actions to verbs of ids [B, L], as OTA and ASP do.

    `nouns` and `verbs` [B, L] mark the last piece of each.
    """
    c = model.config
    words = model.alignment_text(text, tokens)
    b, length = nouns.shape
    valid = jnp.ones(b, bool)
    nothing = jnp.zeros((b, 0), jnp.int32), jnp.zeros((b, 0, length))
    found = {"objects": nothing, "actions": nothing}
    if c.objects:
        of = objectives.ota(
            video.objects,
            video.object_mask,
            words,
            nouns,
            text.sep_index,
            valid,
            similarity=c.alignment,
        )
        found["objects"] = of.columns, of.scores
    if c.actions and c.alignment == "cosine":
        of = objectives.asp(video.actions, words, verbs, text.sep_index, valid)
        found["actions"] = of.columns, of.scores
    elif c.actions:  # the authors use Ø once, as for objects
        every = jnp.ones(video.actions.shape[:2], bool)
        of = objectives.ota(
            video.actions, every, words, verbs, text.sep_index, valid, similarity=c.alignment
        )
        found["actions"] = of.columns, of.scores
    return Alignments(*found["objects"], *found["actions"])


@jax.jit
def action_attention(model: Stoa, pixels: Array, boxes: Array, classes: Array) -> Array:
    """Return the attention of each action query to each patch [B, A, T, H, W]."""
    c = model.config
    b, t = pixels.shape[:2]
    blocks = sorted({c.action_block, c.object_block} if c.objects else {c.action_block})
    _, tapped = model.visual(pixels.reshape(b * t, *pixels.shape[2:]), blocks, frames=t)
    patches = {block: x[:, 1:].reshape(b, t, -1, x.shape[-1]) for block, x in tapped.items()}
    objects = valid = None
    if model.regions is not None:
        valid = classes >= 0
        objects = model.regions(patches[c.object_block], jnp.where(valid[..., None], boxes, 0))
    assert model.action is not None  # the caller checked that the model has actions
    weights, _ = model.action.attention(patches[c.action_block], objects, valid)
    weights = weights[..., : c.grid**2].astype(jnp.float32)
    return weights.reshape(b, -1, t, c.grid, c.grid)


@functools.partial(jax.jit, static_argnames=("beams", "max_pieces"))
def caption_tokens(model: Stoa, video: VideoFeatures, *, beams: int, max_pieces: int) -> Array:
    """Return captions [B, M + 2], start and end tokens included."""
    c, clips = model.config, video.cls.shape[0]
    visual = decoding.visual_keys(model, video)
    cache = decoding.empty_cache(model, clips, beams, max_pieces + 1)

    def step(cache, tokens, position):
        return decoding.next_word(model, visual, cache, tokens, position)

    options = {"start": c.vocab_size - 2, "end": c.vocab_size - 1, "max_pieces": max_pieces}
    if beams == 1:
        return decode.greedy(step, cache, clips, **options).tokens
    return decode.beam_search(step, cache, clips, beams=beams, **options).tokens
