"""The STOA-VLP model: pixels, boxes and text in; features, match and word logits out.

Shapes: B clips, T frames, S side of a frame, K objects per frame, N trajectories, A actions,
L text positions, d shared width, V vocabulary.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from stoa_jax import ops
from stoa_jax.models import released
from stoa_jax.models.action import ActionEncoder
from stoa_jax.models.clip import TextTower, VisionTower, text_ends
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.features import (
    Fused,
    FusionPass,
    TextFeatures,
    VideoFeatures,
    VisionFeatures,
)
from stoa_jax.models.fusion import FusionEncoder, fusion_mask
from stoa_jax.models.layers import take_positions, unit
from stoa_jax.models.trajectory import RegionEncoder, TrajectoryEncoder


class Stoa(nnx.Module):
    """The whole model."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.visual = VisionTower(c, rngs=rngs)
        self.text = TextTower(c, rngs=rngs)
        regions = RegionEncoder if c.region == "pool_then_mlp" else released.RegionEncoderMlpFirst
        self.regions = regions(c, rngs=rngs) if c.objects else None
        self.trajectory = TrajectoryEncoder(c, rngs=rngs) if c.objects else None
        self.action = ActionEncoder(c, rngs=rngs) if c.actions else None
        self.fusion = FusionEncoder(c, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.log(jnp.array(1 / 0.07, jnp.float32)))

    def encode_video(
        self, pixels: Array, boxes: Array, classes: Array, scores: Array
    ) -> VideoFeatures:
        """Encode clips and their objects.

        Takes uint8 pixels [B, T, S, S, 3], boxes [B, T, K, 4] in [0, 1], classes [B, T, K] (-1 for
        padding) and scores [B, T, K].
        """
        return self.encode_objects(self.encode_frames(pixels), boxes, classes, scores)

    @property
    def tapped(self) -> list[int]:
        """The video encoder's blocks whose tokens objects and actions read."""
        c = self.config
        blocks = {c.object_block} if c.objects else set()
        return sorted(blocks | ({c.action_block} if c.actions else set()))

    def encode_frames(self, pixels: Array) -> VisionFeatures:
        """Run the vision tower: the part of `encode_video` that sees the pixels."""
        b, t = pixels.shape[:2]
        taps = self.tapped
        frames, tapped = self.visual(pixels.reshape(b * t, *pixels.shape[2:]), taps, frames=t)
        return VisionFeatures(
            frames.reshape(b, t, -1),
            {f"block {i}": tapped[i].reshape(b, t, *tapped[i].shape[1:]) for i in taps},
        )

    def encode_objects(
        self, vision: VisionFeatures, boxes: Array, classes: Array, scores: Array
    ) -> VideoFeatures:
        """Encode the objects and actions of clips, given the outputs of the vision tower."""
        c = self.config
        frames = vision.frames.astype(c.dtype)
        b = frames.shape[0]

        def tokens_of(block: int) -> Array:  # [B, T, 1 + P, h], [CLS] first
            return vision.taps[f"block {block}"].astype(c.dtype)

        empty = jnp.zeros((b, 0, frames.shape[-1]), frames.dtype)
        trajectories, mask, chosen = empty, jnp.zeros((b, 0), bool), jnp.zeros((b, 0), jnp.int32)
        verbs = adjectives = empty
        objects, valid = None, None
        if self.regions is not None and self.trajectory is not None:
            valid = classes >= 0
            # A masked box still enters sums, multiplied by zero, so it must be finite.
            boxes = jnp.where(valid[..., None], boxes, 0)
            objects = self.regions(tokens_of(c.object_block)[:, :, 1:], boxes)
            chosen, membership = jax.vmap(
                lambda k, s, b: ops.select_trajectories(
                    k, s, c.trajectories, choice=c.trajectory_choice, boxes=b
                )
            )(classes, scores, boxes)
            mask = chosen >= 0
            x = self.trajectory.read(objects, membership, valid.reshape(b, -1))
            # Zero the padding, so that nothing downstream depends on it.
            trajectories, verbs, adjectives = (
                jnp.where(mask[..., None], y, 0) if y.shape[1] else y
                for y in (
                    self.trajectory.tokens(x),
                    self.trajectory.verbs(x),
                    self.trajectory.adjectives(x),
                )
            )
        actions = empty
        if self.action is not None:
            x = tokens_of(c.action_block)
            if c.action_patches_stop_gradient:
                x = jax.lax.stop_gradient(x)
            actions = self.action(x[:, :, 1:], objects, valid, x[:, :, 0])
        return VideoFeatures(
            frames, frames.mean(1), trajectories, mask, chosen, actions, verbs, adjectives
        )

    def encode_text(self, tokens: Array, masked: Array | None = None) -> TextFeatures:
        """Encode ids [B, L]; positions where `masked` [B, L] is True read the learned [MASK]."""
        x = self.text(tokens, masked)
        sep_index, mask = text_ends(tokens, self.config.vocab_size)
        return TextFeatures(x, at_position(x, sep_index), mask, sep_index)

    def alignment_text(self, text: TextFeatures, tokens: Array) -> Array:
        """Return the features [B, L, d] of the words and of Ø, at [SEP], for OTA and ASP."""
        if self.config.alignment_target == "sentence":
            return text.tokens
        is_sep = jnp.arange(tokens.shape[1]) == text.sep_index[:, None]
        return jnp.where(is_sep[..., None], text.tokens, self.text.alone(tokens))

    def fuse(
        self,
        video: VideoFeatures,
        text: Array,
        text_mask: Array,
        text_attention: Array | None = None,
        masked: Array | None = None,
    ) -> Fused:
        """Run video and text features [B, L, d] through the fusion encoder.

        `text_attention` [B, L, L] makes it a language model: text attends to text as given, and no
        visual position attends to text. `masked` [B, L] marks words that the text tower did not
        see.
        """
        positions = jnp.arange(text.shape[1]) + self.config.visual_length
        read = jnp.concatenate([jnp.array([self.config.frames]), positions])
        read = jnp.broadcast_to(read, (text.shape[0], read.size))
        x, mask = self.fusion_input(video, text, text_mask, text_attention, masked)
        (y,) = self.fuse_passes({"one": FusionPass(x, mask, read)}).values()
        return Fused(y[:, 0], y[:, 1:])

    def fuse_passes(self, passes: Mapping[str, FusionPass]) -> dict[str, Array]:
        """Run several sequences of the same shape through the fusion encoder at once.

        Returns the outputs that each pass reads, [B, Q, d].
        """
        if not passes:
            return {}
        x = jnp.stack([one.x for one in passes.values()], 1)
        mask = jnp.stack([one.mask for one in passes.values()], 1)
        outputs = self.fusion(x, mask, [one.read for one in passes.values()])
        return dict(zip(passes, outputs, strict=True))

    def pair_pass(self, video: VideoFeatures, text: TextFeatures) -> FusionPass:
        """Return the pass of a video and a text that is read at the clip token and at [SEP]."""
        clip = jnp.full_like(text.sep_index, self.config.frames)
        read = jnp.stack([clip, self.config.visual_length + text.sep_index], 1)
        return FusionPass(*self.fusion_input(video, text.tokens, text.mask), read)

    def pair(self, video: VideoFeatures, text: TextFeatures) -> Array:
        """Return the fused outputs at the clip token and at [SEP], [B, 2, d]."""
        (y,) = self.fuse_passes({"pair": self.pair_pass(video, text)}).values()
        return y

    def fusion_input(
        self,
        video: VideoFeatures,
        text: Array,
        text_mask: Array,
        text_attention: Array | None = None,
        masked: Array | None = None,
    ) -> tuple[Array, Array]:
        """Return the fusion sequence [B, S, d] and its attention mask [B, S, S].

        The encoder adds the positions unless `config.fusion_positions` is "tokens_only": then they
        are added here.
        """
        if masked is not None and self.config.masked_text == "zero":
            text = jnp.where(masked[..., None], 0, text)
        # The losses separate what a trajectory is from what it does; fusion reads the sum.
        x = jnp.concatenate(
            [video.frames, video.cls[:, None], video.trajectories, video.actions, text], 1
        )
        visual_mask = jnp.concatenate(
            [
                jnp.ones((text.shape[0], video.frames.shape[1] + 1), bool),
                video.object_mask,
                jnp.ones(video.actions.shape[:2], bool),
            ],
            1,
        )
        if self.config.fusion_positions == "tokens_only":
            x = released.add_positions_to_tokens_only(
                x, self.fusion.position_table(), video.frames.shape[1], text_mask
            )
        return x, fusion_mask(visual_mask, text_mask, text_attention)

    def lm_logits(self, x: Array, key: Array | None = None, words: Array | None = None) -> Array:
        """Return word logits [..., V] of features [..., d]; a `key` enables `head_dropout`.

        With `words` [W], return the logits [..., W] of these ids alone.
        """
        return self.fusion.lm_logits(x, self.text.token_embedding[...], key, words)

    def match_logits(self, pair: Array, key: Array | None = None) -> Array:
        """Return logits [..., 2] of "the text describes the video"; column 1 means yes.

        `pair` [..., 2, d] are the fused outputs at the clip token and at [SEP]; a `key` enables
        `head_dropout`.
        """
        match = self.fusion.match
        if isinstance(match, released.BilinearMatch):
            return match(pair[..., 0, :], pair[..., 1, :], self.config.head_dropout, key)
        return match(_flat_float32(pair))

    def answer_logits(self, pair: Array) -> Array:
        """Return logits [..., num_answers] over the answers of the training set.

        `pair` [..., 2, d] are the fused outputs at the clip token and at [SEP].
        """
        if self.fusion.answer is None:
            raise ValueError(
                "answer_logits: config.num_answers is 0, so the model has no answer head"
            )
        return self.fusion.answer(_flat_float32(pair))

    def next_token_features(self, video: VideoFeatures, text: Array) -> Array:
        """Return the features [B, L, d] that predict the next token of text [B, L, d].

        For `config.prefix_lm == "position_query"`.
        """
        return released.next_token_features(
            self.config, self.fusion.blocks, self.fusion.position_table(), video, text
        )

    def first_piece_logits(
        self, video: VideoFeatures, text: TextFeatures, key: Array | None = None
    ) -> Array:
        """Return logits [B, V] of the first piece of the answer to a question.

        For `config.answer_head == "first_piece"`; a `key` enables `head_dropout`.
        """
        x, mask = self.fusion_input(video, text.tokens, text.mask)
        x = released.answer_features(
            self.config, self.fusion.blocks, self.fusion.position_table(), x, mask
        )
        return self.lm_logits(x, key)

    def scale(self) -> Array:
        """Return the factor of cosine similarities; each update keeps it at 100 or below."""
        return jnp.exp(self.logit_scale[...])


def embed_video(video: VideoFeatures) -> Array:
    """Return clip embeddings [B, d]: the normalised mean of the normalised frame tokens."""
    return unit(unit(video.frames).mean(1))


def embed_text(text: TextFeatures) -> Array:
    """Return text embeddings [B, d]."""
    return unit(text.sep)


def at_position(x: Array, index: Array) -> Array:
    """Return `x[b, index[b]]` for `x` [B, L, d] and `index` [B]."""
    return take_positions(x, index[:, None])[:, 0]


def _flat_float32(pair: Array) -> Array:  # [..., 2, d] -> [..., 2 d]
    # Small heads are cheap, and bfloat16 logits of a match or an answer tie too often.
    return pair.reshape(*pair.shape[:-2], -1).astype(jnp.float32)
