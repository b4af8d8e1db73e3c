"""Probe what a checkpoint's tokens encode: a clip's first motion, and the color of a named object.

    python -m benchmarks.probe --checkpoint=synthetic

Motion: ridge regression predicts which of 15 motions comes first in a clip, from trajectory tokens,
action tokens or frame tokens. The same probe is fitted to encoders that were never trained, on the
same vision tower, and to encoders trained with the motions as labels. No objective can teach more
about the motions than labels do. So with as many clips and steps as the checkpoint had (--train,
--steps), the labels give an upper bound; the default training is shorter.

Color: with --colors, ridge regression predicts the color of an object whose shape is unique in its
clip, from the patches in the object's true box, the frame tokens, or the trajectory of its class.
The table also shows the answer head's accuracy for "what color is the SHAPE?". A comparison of the
rows shows whether colors are lost in the vision tower or after it.

Clips are rendered live; those of the test split are held out. n clips, T frames, K objects per
frame, N trajectories, A actions, h vision width, d shared width.
"""

import argparse
import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import stoa_jax
from stoa_jax import objectives, ops, weights
from stoa_jax.data.split import fit_tokens
from stoa_jax.data.synthetic import World, parts_of_speech
from stoa_jax.data.synthetic.scene import COLOURS, MOTIONS, SHAPES, Scene
from stoa_jax.inference.model import Model
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.features import VideoFeatures, VisionFeatures
from stoa_jax.models.parameters import named_parameters, with_parameters
from stoa_jax.models.stoa import Stoa
from stoa_jax.weights import clip

BATCH = 100
ENCODERS = ("regions", "trajectory", "action")
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of ridge regression, times the number of clips
RATE, LABEL_STEPS, LABEL_BATCH = 1e-3, 400, 64
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


def labels_trained(model: Stoa, clips: Clips, steps: int, seed: int) -> Stoa:
    """Return the model with encoders trained to predict the first motion by a linear layer."""
    labels = clips.motions
    params = named_parameters(model)
    learned = {n: x for n, x in params.items() if n.split("/")[0] in ENCODERS}
    fixed = {n: x for n, x in params.items() if n not in learned}
    sizes = {name: x.shape[-1] for name, x in _shapes(model, clips).items() if name != "frames"}
    heads = {name: jnp.zeros((size, len(MOTIONS))) for name, size in sizes.items()}
    state = (learned, heads)
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0, RATE, steps // 20 + 1, steps))

    def loss(state: tuple, vision: VisionFeatures, objects: tuple, labels: jax.Array) -> jax.Array:
        found = motion_features(
            encode(with_parameters(model, {**fixed, **state[0]}), vision, objects)
        )
        logits = [found[name] @ head for name, head in state[1].items()]
        return sum(objectives.cross_entropy(one, labels).mean() for one in logits)

    rng = np.random.default_rng(seed)
    chosen = (rng.choice(len(labels), LABEL_BATCH) for _ in range(steps))
    batches = ((*clips.batch(rows), labels[rows]) for rows in chosen)
    after, _ = last(updates(state, loss, batches, optimizer))
    return with_parameters(model, {**fixed, **after})


def _shapes(model: Stoa, clips: Clips) -> Mapping[str, jax.ShapeDtypeStruct]:
    return jax.eval_shape(
        lambda *batch: motion_features(encode(model, *batch)), *clips.batch(slice(0, 1))
    )


def probe_motion(models: Mapping[str, Stoa], train: Clips, test: Clips) -> Iterator[str]:
    """Yield the lines of a Markdown table: the accuracy for each kind of token and each model."""
    yield "| first motion read off | " + " | ".join(models) + " |"
    yield "|---" * (len(models) + 1) + "|"
    columns: dict[str, dict[str, str]] = {}
    for name, model in models.items():
        of_train, of_test = collected(model, train), collected(model, test)
        targets = np.eye(len(MOTIONS))[train.motions]
        for what, x in of_train.items():
            right = scores(x, targets, of_test[what]).argmax(1) == test.motions
            columns.setdefault(what, {})[name] = percent(right)
    for what, cells in columns.items():
        yield f"| {what} | " + " | ".join(cells[name] for name in models) + " |"
    common = np.bincount(train.motions).argmax()
    yield f"\nThe most frequent motion: {percent(test.motions == common)} %."


# The color of a named object


def named_things(clips: Clips) -> list[tuple[int, int]]:
    """Return (clip, object) for every object whose shape no other object of its clip has."""
    found = []
    for i, scene in enumerate(clips.scenes):
        shapes = [thing.shape for thing in scene.things]
        found += [(i, k) for k, shape in enumerate(shapes) if shapes.count(shape) == 1]
    return found


@functools.partial(jax.jit, static_argnames="c")
def box_patches(c: ModelConfig, patches: jax.Array, boxes: jax.Array) -> jax.Array:
    """Return the mean over frames of the patches [T, P, h] in a box [T, 4], as objects see them."""
    shown = (boxes[:, 2:] > boxes[:, :2]).all(-1)
    grid = patches.reshape(c.frames, c.grid, c.grid, -1)

    def align(features: jax.Array, box: jax.Array) -> jax.Array:
        size = (c.roi_size, c.roi_size)
        return ops.roi_align(features, box[None], size, sampling_ratio=2, spatial_scale=c.grid)[0]

    regions = jax.vmap(align)(grid, boxes).max((1, 2))  # [T, h]
    return jnp.where(shown[:, None], regions, 0).sum(0) / jnp.maximum(shown.sum(), 1)


def colour_features(model: Stoa, clips: Clips, things: Sequence[tuple[int, int]]) -> Arrays:
    """Return the inputs of the color probe by name, each [objects, features]."""
    c = model.config
    patches = clips.seen[f"block {c.object_block}"][:, :, 1:]
    frames = clips.seen["frames"].astype(np.float32).mean(1)
    videos = [jax.device_get(video) for video in video_features(model, clips)]
    tokens, classes = (
        np.concatenate([getattr(video, name) for video in videos])
        for name in ("trajectories", "object_classes")
    )
    found: dict[str, list[np.ndarray]] = {"patches": [], "frames": [], "trajectory": []}
    for i, k in things:
        shape = SHAPES.index(clips.scenes[i].things[k].shape)
        one = box_patches(c, patches[i].astype(np.float32), clips.true_boxes[i][:, k])
        found["patches"].append(np.asarray(one))
        # Frame tokens do not say which object is meant, so each shape has its own weights.
        of_shape = np.zeros((len(SHAPES), frames.shape[1] + 1), np.float32)
        of_shape[shape] = [*frames[i], 1]
        found["frames"].append(of_shape.reshape(-1))
        is_class = classes[i] == shape
        found["trajectory"].append(tokens[i][is_class].sum(0))  # 0 if the class was not chosen
    return {name: np.stack(x) for name, x in found.items()}


def answered(model: Model, clips: Clips, things: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return for each object whether the answer head names its color."""
    network = model.whole
    assert network is not None
    questions = [f"what color is the {clips.scenes[i].things[k].shape}?" for i, k in things]
    kept = list(model.answers)

    @jax.jit
    def answer(network: Stoa, vision: VisionFeatures, objects: tuple, ids: jax.Array) -> jax.Array:
        video = network.encode_objects(vision, *objects)
        return network.answer_logits(network.pair(video, network.encode_text(ids))).argmax(-1)

    right = []
    for start in range(0, len(things), BATCH):
        part = things[start : start + BATCH]
        c = network.config
        pieces = [model.tokenizer.pieces(text) for text in questions[start : start + BATCH]]
        ids = np.stack([model.tokenizer.pack(one, c.text_length) for one in pieces])
        best = answer(network, *clips.batch([i for i, _ in part]), ids)
        said = [kept[j] if j < len(kept) else "" for j in np.asarray(best)]
        right += [
            word == clips.scenes[i].things[k].colour
            for word, (i, k) in zip(said, part, strict=True)
        ]
    return np.array(right)


def probe_colours(model: Model, train: Clips, test: Clips) -> Iterator[str]:
    """Yield the lines of a Markdown table: the accuracy of the color of a named object."""
    network = model.whole
    assert network is not None
    asked = {"train": (train, named_things(train)), "test": (test, named_things(test))}
    colours = {
        name: np.array([COLOURS.index(clips.scenes[i].things[k].colour) for i, k in things])
        for name, (clips, things) in asked.items()
    }
    found = {name: colour_features(network, *of) for name, of in asked.items()}
    targets = np.eye(len(COLOURS))[colours["train"]]
    yield f"| color of a named thing ({len(colours['test'])}) read off | % |\n|---|---|"
    for what, label in (
        ("patches", "patches in its true box, which objects are made of"),
        ("frames", "frame tokens, weights for each shape"),
        ("trajectory", "the trajectory of its class, as fusion reads it"),
    ):
        predicted = scores(found["train"][what], targets, found["test"][what]).argmax(1)
        yield f"| {label} | {percent(predicted == colours['test'])} |"
    yield f"| the answer head | {percent(answered(model, *asked['test']))} |"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model is probed, and on which clips."""
    parser.add_argument("--checkpoint", default="synthetic", help="model, as for stoa_jax.load")
    parser.add_argument("--train", type=int, default=6000, help="clips to train and fit on")
    parser.add_argument("--test", type=int, default=1000, help="held-out clips")
    parser.add_argument("--max-objects", type=int, default=3, help="most objects in a clip")
    parser.add_argument("--seed", type=int, default=0)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--steps", type=int, default=LABEL_STEPS, help="steps on labels; 0: off")
    parser.add_argument("--colors", action="store_true", help="also probe colors of named objects")
    args = parser.parse_args(argv)
    began = time.monotonic()
    model = stoa_jax.load(args.checkpoint)
    network = model.whole
    if network is None or not network.config.objects:
        parser.error(f"--checkpoint: {args.checkpoint} has no trajectory encoder to probe")
    train, test = (
        draw(network, split, count, args.max_objects)
        for split, count in (("train", args.train), ("test", args.test))
    )
    fresh = untrained(network, args.seed)
    models = {"untrained": fresh, "checkpoint": network}
    if args.steps:
        models["trained by labels"] = labels_trained(fresh, train, args.steps, args.seed)
    for line in probe_motion(models, train, test):
        print(line, flush=True)
    if args.colors and model.answers:
        print()
        for line in probe_colours(model, train, test):
            print(line, flush=True)
    print(f"\n{args.train} clips to fit, {args.test} held out; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
