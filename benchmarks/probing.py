"""Code that the probing benchmarks share: clips, a model's tokens for them, and ridge regression.

n clips, T frames, K objects per frame, N trajectories, A actions, L text positions, h vision width,
d shared width.
"""

import argparse
import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from stoa_jax import weights
from stoa_jax.data.split import fit_tokens
from stoa_jax.data.synthetic import World, parts_of_speech
from stoa_jax.data.synthetic.scene import MOTIONS, Scene
from stoa_jax.models.features import VideoFeatures, VisionFeatures
from stoa_jax.models.parameters import named_parameters, with_parameters
from stoa_jax.models.stoa import Stoa
from stoa_jax.weights import clip

BATCH = 100  # clips encoded at a time
ENCODERS = ("regions", "trajectory", "action")
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of ridge regression, times the number of clips
RATE, TRAIN_BATCH = 1e-3, 64  # of the encoders that a benchmark trains
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Clips:
    """Clips as the encoders after the vision tower read them, with their scenes."""

    seen: Arrays  # outputs of the vision tower by name, float16
    objects: tuple[np.ndarray, np.ndarray, np.ndarray]  # boxes, classes, scores
    true_boxes: list[np.ndarray]  # [T, objects of the scene, 4]
    scenes: list[Scene]
    captions: list[list[str]]

    @property
    def motions(self) -> np.ndarray:
        """The first motion of each clip, as an index of MOTIONS."""
        return np.array([MOTIONS.index(scene.events[0].motion) for scene in self.scenes])

    def batch(self, rows: Sequence[int] | np.ndarray | slice) -> tuple[VisionFeatures, tuple]:
        """Return the arguments of `Stoa.encode_objects` for some clips."""
        seen = {name: x[rows].astype(np.float32) for name, x in self.seen.items()}
        return VisionFeatures(seen.pop("frames"), seen), tuple(x[rows] for x in self.objects)


def draw(model: Stoa, split: str, count: int, max_objects: int) -> Clips:
    """Render the first clips of a split and run the vision tower on them."""
    c = model.config
    world = World(split, 0, c.image_size, c.frames, max_objects, c.objects_per_frame, siblings=1)
    see = jax.jit(model.encode_frames)
    seen: dict[str, list[np.ndarray]] = {}
    objects, true_boxes, captions = [], [], []
    for start in range(0, count, BATCH):
        clips = [world.clip(i) for i in range(start, min(start + BATCH, count))]
        found = see(np.stack([one.frames for one in clips]))
        for name, x in (("frames", found.frames), *found.taps.items()):
            seen.setdefault(name, []).append(np.asarray(x, np.float16))
        objects += [(one.boxes, one.classes, one.scores) for one in clips]
        true_boxes += [one.true_boxes for one in clips]
        captions += [one.captions for one in clips]
    boxes, classes, scores = (np.stack(x) for x in zip(*objects, strict=True))
    scenes = [world.scene(i) for i in range(count)]
    joined = {name: np.concatenate(parts) for name, parts in seen.items()}
    return Clips(joined, (boxes, classes, scores), true_boxes, scenes, captions)


@jax.jit
def encode(model: Stoa, vision: VisionFeatures, objects: tuple) -> VideoFeatures:
    """Run the encoders after the vision tower."""
    return model.encode_objects(vision, *objects)


def video_features(model: Stoa, clips: Clips) -> Iterator[VideoFeatures]:
    """Yield the features of `clips`, batch by batch."""
    for start in range(0, len(clips.scenes), BATCH):
        yield encode(model, *clips.batch(slice(start, start + BATCH)))


def captions(model: Stoa, clips: Clips) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and tags [n, captions of a clip, L] of the clips' captions."""
    c, count = model.config, len(clips.captions)
    parsed = [one for texts in clips.captions for one in parts_of_speech.parse(texts)]
    whole_tokens, whole_tags = (np.stack(part) for part in zip(*parsed, strict=True))
    tokens, tags = fit_tokens(whole_tokens, whole_tags, c.text_length, c.vocab_size)
    return tokens.reshape(count, -1, c.text_length), tags.reshape(count, -1, c.text_length)


def mean_trajectory(tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the mean [B, d] of the valid tokens among [B, N, d]."""
    count = jnp.maximum(mask.sum(1, keepdims=True), 1)
    return jnp.where(mask[..., None], tokens, 0).sum(1) / count


def motion_features(video: VideoFeatures) -> dict[str, jax.Array]:
    """Return the inputs of the motion probe by name, each [B, features]."""
    found = {
        "frames": video.frames.reshape(len(video.frames), -1),
        "trajectories": mean_trajectory(video.objects, video.object_mask),
    }
    if video.verbs.shape[1]:
        found["trajectories, projected to verbs"] = mean_trajectory(video.verbs, video.object_mask)
    if video.actions.shape[1]:
        found["actions"] = video.actions.reshape(len(video.actions), -1)
    return found


def collected(model: Stoa, clips: Clips) -> Arrays:
    """Return `motion_features` of all clips."""
    parts = [jax.device_get(motion_features(video)) for video in video_features(model, clips)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def ridge(x: np.ndarray, targets: np.ndarray, penalty: float) -> np.ndarray:
    """Return the weights of ridge regression; the last row is the constant."""
    x = np.concatenate([x, np.ones((len(x), 1))], 1)
    gram = x.T @ x
    gram[np.diag_indices(len(gram) - 1)] += penalty * len(x)
    return np.linalg.solve(gram, x.T @ targets)


def scores(train: np.ndarray, targets: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Fit targets [n, classes] by ridge regression and return the predictions for `test`.

    Features are standardised. The penalty is the best one for a fifth of the training rows.
    """
    mean, spread = train.mean(0), train.std(0) + 1e-6
    train, test = ((x - mean).astype(np.float64) / spread for x in (train, test))
    cut = len(train) * 4 // 5

    def error(penalty: float) -> float:
        w = ridge(train[:cut], targets[:cut], penalty)
        return float(np.square(train[cut:] @ w[:-1] + w[-1] - targets[cut:]).mean())

    w = ridge(train, targets, min(PENALTIES, key=error))
    return test @ w[:-1] + w[-1]


def percent(right: np.ndarray) -> str:
    """Format an accuracy with its binomial standard error."""
    p = float(np.mean(right))
    return f"{100 * p:.1f} ± {100 * (p * (1 - p) / len(right)) ** 0.5:.1f}"


def untrained(model: Stoa, seed: int) -> Stoa:
    """Return the model with the encoders as training initialises them, and with the same towers."""
    c = model.config
    params = named_parameters(model)
    make = jax.jit(lambda key: named_parameters(Stoa(c, rngs=nnx.Rngs(params=key))))
    fresh = make(jax.random.key(seed))
    host = {name: np.asarray(x) for name, x in params.items() if name.startswith("visual/")}
    copied = dict(host)
    shapes = {name: x.shape for name, x in fresh.items()}
    clip.initial_from_clip(copied, c, shapes, weights.Report("", ""))
    start = {**fresh, **{name: jnp.asarray(x) for name, x in copied.items()}}
    return with_parameters(
        model, {n: start[n] if n.split("/")[0] in ENCODERS else params[n] for n in params}
    )


def updates(
    learned: Any,
    loss: Callable[..., jax.Array],
    batches: Iterable[tuple],
    optimizer: optax.GradientTransformation,
) -> Iterator[Any]:
    """Minimise `loss(learned, *batch)` and yield `learned` after the update by each batch."""
    moments = optimizer.init(learned)

    @jax.jit
    def step(learned: Any, moments: optax.OptState, *batch: Any) -> tuple:
        gradient = jax.grad(loss)(learned, *batch)
        changes, moments = optimizer.update(gradient, moments, learned)
        return optax.apply_updates(learned, changes), moments

    for batch in batches:
        learned, moments = step(learned, moments, *batch)
        yield learned


def last(values: Iterable[Any]) -> Any:
    """Return the last value, without keeping the others."""
    return collections.deque(values, maxlen=1).pop()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model is probed, and on which clips."""
    parser.add_argument("--checkpoint", default="synthetic", help="model, as for stoa_jax.load")
    parser.add_argument("--train", type=int, default=6000, help="clips to train and fit on")
    parser.add_argument("--test", type=int, default=1000, help="held-out clips")
    parser.add_argument("--max-objects", type=int, default=3, help="most objects in a clip")
    parser.add_argument("--seed", type=int, default=0)
