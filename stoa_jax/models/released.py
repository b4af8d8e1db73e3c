"""Where the authors' public code computes something else than the paper says.

Each module or pass here is the other value of one field of `ModelConfig`; `stoa.py` chooses.

Shapes: B clips, T frames, K objects a frame, P = G·G patches, h vision width, S visual places of
the fusion sequence, L text places, d shared width, V vocabulary.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from stoa_jax import ops
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.layers import Linear, normal, run_blocks

if TYPE_CHECKING:
    from stoa_jax.models.stoa import Stoa, VideoFeatures


class RegionEncoderMlpFirst(nnx.Module):
    """`max(MLP(RoIAlign(patches, box)))`, the place of the object among its frame's, and its box.

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
        """[B, T, P, h] and boxes [B, T, K, 4] in [0, 1] -> object tokens [B, T, K, h]."""
        c = self.config
        b, t, _, h = patches.shape
        grid = patches.reshape(b, t, c.grid, c.grid, h)

        def region(features: Array, boxes: Array) -> Array:
            # They sample a bin adaptively: once, as no box is larger than the frame.
            x = ops.roi_align(
                features, boxes, (c.roi_size, c.roi_size), sampling_ratio=1, spatial_scale=c.grid
            )
            x = jax.nn.relu(self.down(jax.nn.relu(self.up(x.astype(features.dtype)))))
            return x.max((1, 2))  # [K, h]

        tokens = jax.vmap(jax.vmap(region))(grid, boxes)
        where = jax.nn.relu(self.box_down(jax.nn.relu(self.box_up(boxes.astype(patches.dtype)))))
        slot = self.slot_embedding[...].astype(patches.dtype)
        when = self.frame_embedding[...].astype(patches.dtype)[:, None]
        return tokens + slot + where + when


class BilinearMatch(nnx.Module):
    """Does the text belong to the video: one bilinear form for no, one for yes.

    `config.match_head == "bilinear"`. The video's side is of unit length. The text's side is
    divided, feature by feature, by that feature's length over all rows of the call: so does the
    authors' code, in training and in testing, and so a score depends on the rows beside it.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.unmatched = normal(rngs, (width, width), width**-0.5)
        self.matched = normal(rngs, (width, width), width**-0.5)

    def __call__(self, video: Array, text: Array, rate: float = 0.0, key: Array | None = None):
        """[..., d] and [..., d] -> logits [..., 2]; with a `key`, inputs are dropped at `rate`."""
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


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Each entry zero with probability `rate`, the rest scaled up; unchanged without a key."""
    if key is None or not rate:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def joint_frames(blocks, x: Array, frames: int, *, start: int, stop: int, **run) -> Array:
    """Frames [B·T, 1 + P, h] through blocks in which all places of a clip see each other.

    The last `config.joint_blocks` of the video encoder.
    """
    n, places, h = x.shape
    x = run_blocks(blocks, x.reshape(-1, frames * places, h), start=start, stop=stop, **run)
    return x.reshape(n, places, h)


def place_tokens_only(x: Array, positions: Array, clip: int, text: Array) -> Array:
    """The fusion sequence [B, S + L, d] with positions, except v_cls and the last text place.

    `config.fusion_positions == "tokens_only"`; `text` [B, L] says which places hold text.
    """
    length = text.shape[1]
    at = jnp.arange(x.shape[1])
    last = x.shape[1] - length + text.sum(-1) - 1  # [B]
    bare = (at == clip) | (at == last[:, None])
    return x + jnp.where(bare[..., None], 0, positions[: x.shape[1]].astype(x.dtype))


def visual_places(model: "Stoa", video: "VideoFeatures") -> tuple[Array, Array]:
    """The visual half of the language model's sequence [B, S, d], and which of it counts [B, S].

    Here neither the frames nor v_cls carry a position.
    """
    b, t, _ = video.frames.shape
    x = jnp.concatenate([video.objects, video.actions], 1)
    x = x + model.fusion.positions[...][t + 1 : t + 1 + x.shape[1]].astype(x.dtype)
    always = jnp.ones((b, t + 1), bool)
    acted = jnp.ones(video.actions.shape[:2], bool)
    x = jnp.concatenate([video.frames, video.cls[:, None], x], 1)
    return x, jnp.concatenate([always, video.object_mask, acted], 1)


def next_word_places(model: "Stoa", video: "VideoFeatures", text: Array) -> Array:
    """For each text place, what the next word is told from [B, L, d]; the last place has none.

    `config.prefix_lm == "position_query"`: a word is told from its position alone, which sees all
    that is visual and the words before it. The authors run the fusion encoder once for each word;
    words do not see these queries, so one sequence, the text and then the queries, does it.
    """
    c = model.config
    visual, counts = visual_places(model, video)
    b, s, _ = visual.shape
    length = text.shape[1]
    positions = model.fusion.positions[...][s : s + length].astype(text.dtype)
    queries = jnp.broadcast_to(positions, text.shape)
    x = jnp.concatenate([visual, text + positions, queries], 1)  # [B, S + 2 L, d]

    before = jnp.tri(length, k=-1, dtype=bool)
    own = jnp.eye(length, dtype=bool)
    none = jnp.zeros((length, length), bool)
    words = jnp.block([[before | own, none], [before, own]])  # [2 L, 2 L]
    mask = jnp.zeros((b, s + 2 * length, s + 2 * length), bool)
    mask = mask.at[:, :, :s].set(counts[:, None]).at[:, s:, s:].set(words)
    x = run_blocks(
        model.fusion.blocks,
        x,
        mask,
        stop=c.fusion_depth,
        scan=c.scan_layers,
        remat=c.remat,
    )
    told = x[:, s + length + 1 :]
    return jnp.pad(told, ((0, 0), (0, 1), (0, 0)))


def answer_words(
    model: "Stoa", video: "VideoFeatures", text: Array, text_mask: Array, key: Array | None = None
) -> Array:
    """The first piece of a question's answer, logits [B, V] over all words.

    `config.answer_head == "first_piece"`: told from one more place behind the text, which holds
    its position only.
    """
    b, _, d = text.shape
    x, mask = model.fusion_input(video, text, text_mask)
    at = x.shape[1]
    answer = jnp.broadcast_to(model.fusion.positions[...][at].astype(x.dtype), (b, 1, d))
    x = jnp.concatenate([x, answer], 1)
    seen = jnp.concatenate([mask[:, 0], jnp.ones((b, 1), bool)], 1)
    x = run_blocks(
        model.fusion.blocks,
        x,
        jnp.broadcast_to(seen[:, None], (b, at + 1, at + 1)),
        scan=model.config.scan_layers,
        remat=model.config.remat,
    )
    return model.lm_logits(x[:, -1], key)


def share_of_one_mean(*found):
    """Losses of two alignments, each as its share of one mean over the pairs of both."""
    counts = [(a.columns >= 0).sum() for a in found]
    total = jnp.maximum(sum(counts), 1).astype(jnp.float32)
    return [a._replace(loss=a.loss * n / total) for a, n in zip(found, counts, strict=True)]
