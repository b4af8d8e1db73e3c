"""STOA-VLP: pixels, boxes and text in; tokens, matches and words out.

Shapes: B clips, T frames, S side, K objects a frame, N trajectories, A actions, L text places,
d shared width, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from stoa_jax import ops
from stoa_jax.models.action import ActionEncoder
from stoa_jax.models.clip import TextTower, VisionTower, text_ends
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.fusion import FusionEncoder, fusion_mask
from stoa_jax.models.layers import unit
from stoa_jax.models.released import RegionEncoderMlpFirst, place_tokens_only
from stoa_jax.models.trajectory import RegionEncoder, TrajectoryEncoder


class VideoFeatures(NamedTuple):
    """What the video side says of a batch of clips."""

    frames: Array  # [B, T, d]
    cls: Array  # [B, d], the frames' mean
    objects: Array  # [B, N, d]
    object_mask: Array  # [B, N]
    object_classes: Array  # [B, N], -1 where padding
    actions: Array  # [B, A, d]


class TextFeatures(NamedTuple):
    """What the text side says of a batch of texts."""

    tokens: Array  # [B, L, d]
    sep: Array  # [B, d], at [SEP]: the whole text
    mask: Array  # [B, L]
    sep_index: Array  # [B]


class Fused(NamedTuple):
    """What the fusion encoder makes of both."""

    cls: Array  # [B, d], at the clip's place
    text: Array  # [B, L, d]


class Stoa(nnx.Module):
    """The whole model."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.visual = VisionTower(c, rngs=rngs)
        self.text = TextTower(c, rngs=rngs)
        regions = RegionEncoder if c.region == "pool_then_mlp" else RegionEncoderMlpFirst
        self.regions = regions(c, rngs=rngs) if c.objects else None
        self.trajectory = TrajectoryEncoder(c, rngs=rngs) if c.objects else None
        self.action = ActionEncoder(c, rngs=rngs) if c.actions else None
        self.fusion = FusionEncoder(c, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.log(jnp.array(1 / 0.07, jnp.float32)))

    def encode_video(
        self, pixels: Array, boxes: Array, classes: Array, scores: Array
    ) -> VideoFeatures:
        """uint8 [B, T, S, S, 3], boxes [B, T, K, 4] in [0, 1], classes and scores [B, T, K]."""
        c = self.config
        b, t = pixels.shape[:2]
        taps = (
            *((c.object_block,) if c.objects else ()),
            *((c.action_block,) if c.actions else ()),
        )
        frames, tapped = self.visual(pixels.reshape(b * t, *pixels.shape[2:]), taps, frames=t)
        frames = frames.reshape(b, t, -1)

        def places(block: int) -> Array:  # [B, T, 1 + P, h], [CLS] first
            x = tapped[block]
            return x.reshape(b, t, *x.shape[1:])

        none = jnp.zeros((b, 0, frames.shape[-1]), frames.dtype)
        trajectories, mask, chosen = none, jnp.zeros((b, 0), bool), jnp.zeros((b, 0), jnp.int32)
        objects, valid = None, None
        if c.objects:
            valid = classes >= 0
            # A masked place still reaches the sums, times zero: it must be finite.
            boxes = jnp.where(valid[..., None], boxes, 0)
            objects = self.regions(places(c.object_block)[:, :, 1:], boxes)
            chosen, membership = jax.vmap(
                lambda k, s: ops.select_trajectories(
                    k, s, c.trajectories, choice=c.trajectory_choice
                )
            )(classes, scores)
            mask = chosen >= 0
            trajectories = self.trajectory(objects, membership, valid.reshape(b, -1))
            # Padding is zero, so that nothing downstream depends on what it would have been.
            trajectories = jnp.where(mask[..., None], trajectories, 0)
        actions = none
        if c.actions:
            x = places(c.action_block)
            if c.action_patches_stop_gradient:
                x = jax.lax.stop_gradient(x)
            actions = self.action(x[:, :, 1:], objects, valid, x[:, :, 0])
        return VideoFeatures(frames, frames.mean(1), trajectories, mask, chosen, actions)

    def encode_text(self, tokens: Array, masked: Array | None = None) -> TextFeatures:
        """Ids [B, L]; where `masked` [B, L], the learned [MASK] is read instead."""
        x = self.text(tokens, masked)
        sep_index, mask = text_ends(tokens, self.config.vocab_size)
        return TextFeatures(x, at_place(x, sep_index), mask, sep_index)

    def fuse(
        self,
        video: VideoFeatures,
        text: Array,
        text_mask: Array,
        text_attention: Array | None = None,
        masked: Array | None = None,
    ) -> Fused:
        """Video and text features [B, L, d] through the fusion encoder.

        `text_attention` [B, L, L] makes it a language model: text sees text as it says, and
        nothing visual sees text. Where `masked` [B, L], a learned vector stands for the text.
        """
        one = self.fusion_input(video, text, text_mask, text_attention, masked)
        return self.fuse_passes({"one": one})["one"]

    def fuse_passes(self, passes: dict[str, tuple[Array, Array]]) -> dict[str, Fused]:
        """Several `fusion_input`s of one shape through the fusion encoder at once."""
        if not passes:
            return {}
        x, mask = (jnp.stack(parts) for parts in zip(*passes.values(), strict=True))
        fused = jax.vmap(self.fusion)(x, mask)  # [passes, B, S, d]
        clip, text = self.config.frames, self.config.visual_length
        return {name: Fused(y[:, clip], y[:, text:]) for name, y in zip(passes, fused, strict=True)}

    def fusion_input(
        self,
        video: VideoFeatures,
        text: Array,
        text_mask: Array,
        text_attention: Array | None = None,
        masked: Array | None = None,
    ) -> tuple[Array, Array]:
        """The fusion sequence [B, S, d] and its attention mask [B, S, S].

        Positions are left to the encoder if every place has one, else they are in it.
        """
        if masked is not None:
            learned = self.fusion.mask_input
            mask_input = 0 if learned is None else learned[...].astype(text.dtype)
            text = jnp.where(masked[..., None], mask_input, text)
        parts = [video.frames, video.cls[:, None], video.objects, video.actions]
        visual = jnp.concatenate(
            [
                jnp.ones((text.shape[0], video.frames.shape[1] + 1), bool),
                video.object_mask,
                jnp.ones(video.actions.shape[:2], bool),
            ],
            1,
        )
        x = jnp.concatenate([*parts, text], 1)
        if self.config.fusion_positions == "tokens_only":
            table = self.fusion.positions[...]
            x = place_tokens_only(x, table, video.frames.shape[1], text_mask)
        return x, fusion_mask(visual, text_mask, text_attention)

    def lm_logits(self, x: Array, key: Array | None = None) -> Array:
        """Words [..., V] from fused places [..., d]; a `key` switches `head_dropout` on."""
        return self.fusion.lm_logits(x, self.text.token_embedding[...], key)

    def match_logits(self, fused: Fused, sep_index: Array, key: Array | None = None) -> Array:
        """[..., B, 2]: does the text belong to the video? Column 1 says yes."""
        if self.config.match_head == "bilinear":
            text = at_place(fused.text, sep_index)
            return self.fusion.match(fused.cls, text, self.config.head_dropout, key)
        return self.fusion.match(self._pair(fused, sep_index)).astype(jnp.float32)

    def answer_logits(self, fused: Fused, sep_index: Array) -> Array:
        """[B, num_answers] over the answers of the training set."""
        return self.fusion.answer(self._pair(fused, sep_index)).astype(jnp.float32)

    def _pair(self, fused: Fused, sep_index: Array) -> Array:  # [B, 2 d]
        return jnp.concatenate([fused.cls, at_place(fused.text, sep_index)], -1)

    def scale(self) -> Array:
        """What cosine similarities are multiplied by, at most 100 as in CLIP."""
        return jnp.minimum(jnp.exp(self.logit_scale[...]), 100.0)


def embed_video(video: VideoFeatures) -> Array:
    """Clips in the shared space [B, d]: frames normalised, averaged, normalised."""
    return unit(unit(video.frames).mean(1))


def embed_text(text: TextFeatures) -> Array:
    """Texts in the shared space [B, d]."""
    return unit(text.sep)


def at_place(x: Array, index: Array) -> Array:
    """`x[b, index[b]]` for [..., B, L, d] and [..., B], a product: it shards as no gather does."""
    onehot = jax.nn.one_hot(index, x.shape[-2], dtype=x.dtype)
    return jnp.einsum("...l,...ld->...d", onehot, x)
