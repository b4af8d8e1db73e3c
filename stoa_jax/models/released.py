"""The parts of the authors' public code that differ from the paper.

Each module or function here is the other value of one field of `ModelConfig`; `stoa.py` and
`fusion.py` choose between them.

Shapes: B clips, T frames, K objects per frame, P = G·G patches, h vision width, S visual positions
of the fusion sequence, L text positions, d shared width.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from stoa_jax import ops
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.features import VideoFeatures
from stoa_jax.models.layers import Block, Linear, dropout, normal, run_blocks


class RegionEncoderMlpFirst(nnx.Module):
    """Encode objects as `max(MLP(RoIAlign(patches, box)))` plus slot, box and frame embeddings.

    `config.region == "mlp_then_pool"`.
    """

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs):
        h = c.vision_width
        self.config = c

        def linear(d_in: int, d_out: int) -> Linear:
            return Linear(d_in, d_out, std=d_in**-0.5, bias=False, rngs=rngs)

        self.up, self.down = linear(h, h // 2), linear(h // 2, h)
        self.box_up, self.box_down = linear(4, h // 2), linear(h // 2, h)
        self.slot_embedding = nnx.Param(jnp.zeros((c.frames, c.objects_per_frame, h)))
        self.frame_embedding = normal(rngs, (c.frames, h), 0.01)

    def __call__(self, patches: Array, boxes: Array) -> Array:
        """Return object tokens [B, T, K, h] from patches [B, T, P, h] and boxes [B, T, K, 4].

        Boxes are (x1, y1, x2, y2) in [0, 1].
        """
        c = self.config
        b, t, _, h = patches.shape
        grid = patches.reshape(b, t, c.grid, c.grid, h)

        def region(features: Array, boxes: Array) -> Array:
            # They sample a bin adaptively, which is once, because no box is larger than the frame.
            x = ops.roi_align(
                features, boxes, (c.roi_size, c.roi_size), sampling_ratio=1, spatial_scale=c.grid
            )
            x = jax.nn.relu(self.down(jax.nn.relu(self.up(x.astype(features.dtype)))))
            return x.max((1, 2))  # [K, h]

        tokens = jax.vmap(jax.vmap(region))(grid, boxes)
        box = jax.nn.relu(self.box_down(jax.nn.relu(self.box_up(boxes.astype(patches.dtype)))))
        slot = self.slot_embedding[...].astype(patches.dtype)
        frame = self.frame_embedding[...].astype(patches.dtype)[:, None]
        return tokens + slot + box + frame


class BilinearMatch(nnx.Module):
    """Match head of two bilinear forms, one for "no match" and one for "match".

    `config.match_head == "bilinear"`. The video's side is scaled to unit length. The text's side is
    divided, feature by feature, by that feature's norm over all rows of the call. The authors' code
    does so in training and in testing, so a score depends on the other rows.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.unmatched = normal(rngs, (width, width), width**-0.5)
        self.matched = normal(rngs, (width, width), width**-0.5)

    def __call__(
        self, video: Array, text: Array, rate: float = 0.0, key: Array | None = None
    ) -> Array:
        """Return logits [..., 2] of video [..., d] and text [..., d].

        With a `key`, entries of both are dropped at `rate`.
        """
        video, text = video.astype(jnp.float32), text.astype(jnp.float32)
        rows = tuple(range(text.ndim - 1))
        video = video * jax.lax.rsqrt(jnp.square(video).sum(-1, keepdims=True))
        text = text * jax.lax.rsqrt(jnp.square(text).sum(rows, keepdims=True))
        keys = (None,) * 4 if key is None else jax.random.split(key, 4)
        logits = [
            jnp.einsum(
                "...d,de,...e->...", dropout(video, rate, a), form[...], dropout(text, rate, b)
            )
            for form, a, b in (
                (self.unmatched, keys[0], keys[1]),
                (self.matched, keys[2], keys[3]),
            )
        ]
        return jnp.stack(logits, -1)


def add_positions_to_tokens_only(
    x: Array, positions: Array, clip_position: int, text_mask: Array
) -> Array:
    """Add positions to the fusion sequence [B, S + L, d], except at v_cls and the last text token.

    `config.fusion_positions == "tokens_only"`; `text_mask` [B, L] is True for text.
    """
    length = text_mask.shape[1]
    index = jnp.arange(x.shape[1])
    last = x.shape[1] - length + text_mask.sum(-1) - 1  # [B]
    bare = (index == clip_position) | (index == last[:, None])
    return x + jnp.where(bare[..., None], 0, positions[: x.shape[1]].astype(x.dtype))


def visual_sequence(positions: Array, video: VideoFeatures) -> tuple[Array, Array]:
    """Return the visual half of the language model's sequence [B, S, d] and its mask [B, S].

    Neither the frames nor v_cls carry a position here.
    """
    b, t, _ = video.frames.shape
    x = jnp.concatenate([video.objects, video.actions], 1)
    x = x + positions[t + 1 : t + 1 + x.shape[1]].astype(x.dtype)
    frames_mask = jnp.ones((b, t + 1), bool)
    actions_mask = jnp.ones(video.actions.shape[:2], bool)
    x = jnp.concatenate([video.frames, video.cls[:, None], x], 1)
    return x, jnp.concatenate([frames_mask, video.object_mask, actions_mask], 1)


def next_token_features(
    c: ModelConfig, blocks: Block, positions: Array, video: VideoFeatures, text: Array
) -> Array:
    """Return the features [B, L, d] that predict the token after each text position.

    `config.prefix_lm == "position_query"`: a token is predicted from a query that holds its
    position only and attends to everything visual and to the tokens before it. The authors run the
    fusion encoder once per token. Tokens do not attend to the queries, so one sequence of the text
    followed by the queries gives the same numbers. The last position predicts nothing: it is zero.

    `blocks` and `positions` are those of the fusion encoder; `text` is [B, L, d].
    """
    visual, visual_mask = visual_sequence(positions, video)
    b, s, _ = visual.shape
    length = text.shape[1]
    own_position = positions[s : s + length].astype(text.dtype)
    queries = jnp.broadcast_to(own_position, text.shape)
    x = jnp.concatenate([visual, text + own_position, queries], 1)  # [B, S + 2 L, d]

    before = jnp.tri(length, k=-1, dtype=bool)
    itself = jnp.eye(length, dtype=bool)
    nothing = jnp.zeros((length, length), bool)
    words = jnp.block([[before | itself, nothing], [before, itself]])  # [2 L, 2 L]
    mask = jnp.zeros((b, s + 2 * length, s + 2 * length), bool)
    mask = mask.at[:, :, :s].set(visual_mask[:, None]).at[:, s:, s:].set(words)
    queries_only = slice(s + length + 1, None)
    x = run_blocks(blocks, x, mask, keep=queries_only, scan=c.scan_layers, remat=c.remat)
    return jnp.pad(x, ((0, 0), (0, 1), (0, 0)))


def answer_features(
    c: ModelConfig, blocks: Block, positions: Array, x: Array, mask: Array
) -> Array:
    """Return the features [B, d] that predict the first piece of a question's answer.

    `config.answer_head == "first_piece"`: the answer is predicted from one more position behind
    the fusion sequence `x` [B, S + L, d], which holds its position only. `mask` is the sequence's
    attention mask; `blocks` and `positions` are those of the fusion encoder.
    """
    b, length, d = x.shape
    answer = jnp.broadcast_to(positions[length].astype(x.dtype), (b, 1, d))
    x = jnp.concatenate([x, answer], 1)
    valid = jnp.concatenate([mask[:, 0], jnp.ones((b, 1), bool)], 1)
    mask = jnp.broadcast_to(valid[:, None], (b, length + 1, length + 1))
    last = slice(length, None)
    return run_blocks(blocks, x, mask, keep=last, scan=c.scan_layers, remat=c.remat)[:, 0]
