"""A `released` model with weights and a batch sampled from a seed, equal on every machine."""

import dataclasses

import jax
import numpy as np
from flax import nnx

from stoa_jax import objectives
from stoa_jax.joint_loss import joint_loss
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.parameters import with_parameters
from stoa_jax.models.stoa import Stoa
from stoa_jax.weights import parameter_shapes

# The authors' code fixes 12 frames, 14×14 patches of 16, 12 video blocks and a width of 512.
SMALL = dataclasses.replace(
    ModelConfig.base(),
    vision_width=64,
    vision_heads=1,
    vocab_size=1024,
    text_depth=6,
    objects_per_frame=3,
    trajectories=6,
).released()
SMALL = dataclasses.replace(SMALL, head_dropout=0.0)
# A size that the authors' code cannot run, for tests without a reference.
TINY = dataclasses.replace(
    ModelConfig.tiny(), vision_width=64, vision_heads=1, text_width=64, text_heads=1,
    fusion_heads=1, vocab_size=1024, fusion_depth=6, text_depth=6, trajectories=12,
)  # fmt: skip
FULL = dataclasses.replace(ModelConfig.base().released(), head_dropout=0.0)
# Dropout is off: it is not part of the comparison.
SETTINGS = dict(
    vtc=1.0, vtm=1.0, mlm=1.0, plm=1.0, ota=1.0, asp=1.0, verb=0.0, none_weight=1.0,
    match_names=False, seen_words=False, answer=0.0, choice=0.0,
    mask_rate=0.15, proper_nouns=False, matching="scipy",
)  # fmt: skip


def parameters(c: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Return weights at about the scale of a trained model's, none of them zero."""
    rng = np.random.RandomState(seed)  # its stream never changes
    params = {}
    for name, shape in parameter_shapes(c).items():
        x = rng.standard_normal(shape).astype(np.float32)
        if name.endswith("/scale"):
            x = 1 + 0.1 * x
        elif name == "logit_scale":
            x = np.float32(np.log(20.0))
        elif name.endswith("bias"):
            x *= 0.02
        elif name.endswith(("positions", "embedding", "cls", "queries")):
            x *= 0.05
        else:
            inputs = {"qkv/kernel": 1, "out/kernel": 2, "patch/kernel": 3}
            width = next((n for end, n in inputs.items() if name.endswith(end)), 1)
            stacked = "/blocks/" in name
            x *= np.prod(shape[stacked : stacked + width], dtype=np.float64) ** -0.5
        params[name] = np.asarray(x, np.float32)
    return params


def model(c: ModelConfig, params: dict[str, np.ndarray]) -> Stoa:
    """Return the model with these weights."""
    abstract = jax.eval_shape(lambda: Stoa(c, rngs=nnx.Rngs(0)))
    return with_parameters(abstract, {name: jax.numpy.asarray(x) for name, x in params.items()})


def batch(c: ModelConfig, size: int, seed: int = 1) -> dict[str, np.ndarray]:
    """Return clips, boxes with padding, and texts of different lengths with nouns and verbs."""
    rng = np.random.RandomState(seed)
    t, k, length = c.frames, c.objects_per_frame, c.text_length
    s = c.image_size
    low = rng.uniform(0, 0.6, (size, t, k, 2))
    boxes = np.concatenate([low, low + rng.uniform(0.1, 0.4, low.shape)], -1).astype(np.float32)
    classes = rng.randint(1, 9, (size, t, k)).astype(np.int32)
    classes[:, :, k - 1][rng.uniform(size=(size, t)) < 0.5] = -1  # some frames have fewer
    tokens = np.zeros((size, length), np.int32)
    tags = np.zeros((size, length), np.int8)
    for i in range(size):
        n = 8 + 5 * i  # the words, start and end
        tokens[i, :n] = rng.randint(1, c.vocab_size - 2, n)
        tokens[i, 0], tokens[i, n - 1] = c.vocab_size - 2, c.vocab_size - 1
        tags[i, [2, 5]], tags[i, 3] = objectives.NOUN, objectives.VERB
    return {
        "pixels": rng.randint(0, 256, (size, t, s, s, 3)).astype(np.uint8),
        "boxes": boxes,
        "classes": classes,
        "scores": rng.uniform(0.2, 1, (size, t, k)).astype(np.float32),
        "tokens": tokens,
        "tags": tags,
        "valid": np.ones(size, bool),
    }


def chances(data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return fixed values of training's random choices: masked positions and negatives."""
    size, length = data["tokens"].shape
    masked = np.zeros((size, length), bool)
    for i in range(size):
        masked[i, 2 : 4 + i] = True
    return {
        "masked": masked,
        "wrong_video": (np.arange(size) + 1) % size,
        "wrong_text": (np.arange(size) - 1) % size,
    }


def fixed_draws(monkeypatch, data: dict[str, np.ndarray]) -> None:
    """Make the objectives use `chances`; the language model's prefix is the start token."""
    drawn = chances(data)
    masked, tokens = drawn["masked"], data["tokens"]
    size, most = len(tokens), int(masked.sum(1).max())
    places = np.zeros((size, most), np.int32)
    valid = np.zeros((size, most), bool)
    for i in range(size):
        at = np.flatnonzero(masked[i])
        places[i, : len(at)], valid[i, : len(at)] = at, True
    labels = np.where(valid, np.take_along_axis(tokens, places, 1), 0)
    text = objectives.MaskedText(*map(jax.numpy.asarray, (tokens, masked, places, labels, valid)))
    every = jax.numpy.ones(size, bool)
    pairs = jax.numpy.asarray(drawn["wrong_video"]), jax.numpy.asarray(drawn["wrong_text"]), every
    monkeypatch.setattr(objectives, "mask_text", lambda *_: text)
    monkeypatch.setattr(objectives, "hard_negatives", lambda *_: pairs)
    monkeypatch.setattr(objectives, "sample_prefix", lambda _, length: jax.numpy.ones_like(length))


def numbers(m: Stoa, data: dict[str, np.ndarray], monkeypatch) -> dict[str, np.ndarray]:
    """Return all compared values: tokens of every kind, logits, scores, and the five losses."""
    fixed_draws(monkeypatch, data)
    drawn = chances(data)
    found = jax.device_get(jax.jit(_numbers)(m, data, drawn))
    rows, valid = found.pop("rows"), data["classes"] >= 0
    found["objects"] = found["objects"][valid]
    found["trajectories"] = found["trajectories"][found.pop("object_mask")]
    found["mlm_logits"] = found["mlm_logits"][drawn["masked"]]
    found["plm_logits"] = found["plm_logits"][:, :-1][rows[:, 1:]]
    return found


def _numbers(m: Stoa, data, drawn):
    c = m.config
    b, t = data["pixels"].shape[:2]
    video = m.encode_video(data["pixels"], data["boxes"], data["classes"], data["scores"])
    text = m.encode_text(data["tokens"])

    pixels = data["pixels"].reshape(b * t, *data["pixels"].shape[2:])
    patches = m.visual(pixels, (c.object_block,), frames=t)[1][c.object_block]
    boxes = jax.numpy.where(data["classes"][..., None] >= 0, data["boxes"], 0)
    objects = m.regions(patches.reshape(b, t, *patches.shape[1:])[:, :, 1:], boxes)

    masked_features = m.encode_text(data["tokens"], drawn["masked"]).tokens
    masked = m.fuse(video, masked_features, text.mask, masked=drawn["masked"])
    next_token_features = m.next_token_features(video, text.tokens)

    wrong_video = jax.tree.map(lambda x: x[drawn["wrong_video"]], video)
    wrong_text = jax.tree.map(lambda x: x[drawn["wrong_text"]], text)
    three = [
        m.pair(video, text),
        m.pair(wrong_video, text),
        m.pair(video, wrong_text),
    ]
    _, watch = joint_loss(m, data, jax.random.key(0), SETTINGS)
    losses = {name.removeprefix("loss_"): x for name, x in watch.items() if "loss_" in name}
    return {
        "frames": video.frames,
        "text": text.tokens,
        "objects": objects,
        "trajectories": video.objects,
        "actions": video.actions,
        "mlm_logits": m.lm_logits(masked.text),
        "plm_logits": m.lm_logits(next_token_features),
        "match_scores": m.match_logits(jax.numpy.stack(three)),  # [3, B, 2]
        "losses": {
            "vtm": losses["vtm"],
            "mlm": losses["mlm"],
            "plm": losses["plm"],
            "alignment": losses["ota"] + losses["asp"],
            "vtc": losses["vtc"],
        },
        "rows": text.mask,
        "object_mask": video.object_mask,
    }


def sample(found: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Return a few values of each kind, spread over the whole array."""
    few = {}
    for name, x in found.items():
        x = np.asarray([x[k] for k in sorted(x)] if isinstance(x, dict) else x, np.float64).reshape(
            -1
        )
        few[name] = x[np.linspace(0, x.size - 1, min(x.size, 24)).astype(int)].tolist()
    return few
