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
import functools
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

import stoa_jax
from benchmarks import probing
from stoa_jax import objectives, ops
from stoa_jax.data.synthetic.scene import COLOURS, MOTIONS, SHAPES
from stoa_jax.inference.model import Model
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.features import VisionFeatures
from stoa_jax.models.parameters import named_parameters, with_parameters
from stoa_jax.models.stoa import Stoa

LABEL_STEPS = 400


def labels_trained(model: Stoa, clips: probing.Clips, steps: int, seed: int) -> Stoa:
    """Return the model with encoders trained to predict the first motion by a linear layer."""
    labels = clips.motions
    params = named_parameters(model)
    learned = {n: x for n, x in params.items() if n.split("/")[0] in probing.ENCODERS}
    fixed = {n: x for n, x in params.items() if n not in learned}
    sizes = {name: x.shape[-1] for name, x in _shapes(model, clips).items() if name != "frames"}
    heads = {name: jnp.zeros((size, len(MOTIONS))) for name, size in sizes.items()}
    state = (learned, heads)
    optimizer = optax.adamw(
        optax.warmup_cosine_decay_schedule(0, probing.RATE, steps // 20 + 1, steps)
    )

    def loss(state: tuple, vision: VisionFeatures, objects: tuple, labels: jax.Array) -> jax.Array:
        found = probing.motion_features(
            probing.encode(with_parameters(model, {**fixed, **state[0]}), vision, objects)
        )
        logits = [found[name] @ head for name, head in state[1].items()]
        return sum(objectives.cross_entropy(one, labels).mean() for one in logits)

    rng = np.random.default_rng(seed)
    chosen = (rng.choice(len(labels), probing.TRAIN_BATCH) for _ in range(steps))
    batches = ((*clips.batch(rows), labels[rows]) for rows in chosen)
    after, _ = probing.last(probing.updates(state, loss, batches, optimizer))
    return with_parameters(model, {**fixed, **after})


def _shapes(model: Stoa, clips: probing.Clips) -> Mapping[str, jax.ShapeDtypeStruct]:
    return jax.eval_shape(
        lambda *batch: probing.motion_features(probing.encode(model, *batch)),
        *clips.batch(slice(0, 1)),
    )


def probe_motion(
    models: Mapping[str, Stoa], train: probing.Clips, test: probing.Clips
) -> Iterator[str]:
    """Yield the lines of a Markdown table: the accuracy for each kind of token and each model."""
    yield "| first motion predicted from | " + " | ".join(models) + " |"
    yield "|---" * (len(models) + 1) + "|"
    columns: dict[str, dict[str, str]] = {}
    for name, model in models.items():
        of_train, of_test = probing.collected(model, train), probing.collected(model, test)
        targets = np.eye(len(MOTIONS))[train.motions]
        for what, x in of_train.items():
            right = probing.scores(x, targets, of_test[what]).argmax(1) == test.motions
            columns.setdefault(what, {})[name] = probing.percent(right)
    for what, cells in columns.items():
        yield f"| {what} | " + " | ".join(cells[name] for name in models) + " |"
    common = np.bincount(train.motions).argmax()
    yield f"\nThe most frequent motion: {probing.percent(test.motions == common)} %."


# The color of a named object


def named_things(clips: probing.Clips) -> list[tuple[int, int]]:
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


def colour_features(
    model: Stoa, clips: probing.Clips, things: Sequence[tuple[int, int]]
) -> probing.Arrays:
    """Return the inputs of the color probe by name, each [objects, features]."""
    c = model.config
    patches = clips.seen[f"block {c.object_block}"][:, :, 1:]
    frames = clips.seen["frames"].astype(np.float32).mean(1)
    videos = [jax.device_get(video) for video in probing.video_features(model, clips)]
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


def answered(model: Model, clips: probing.Clips, things: Sequence[tuple[int, int]]) -> np.ndarray:
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
    for start in range(0, len(things), probing.BATCH):
        part = things[start : start + probing.BATCH]
        c = network.config
        pieces = [model.tokenizer.pieces(text) for text in questions[start : start + probing.BATCH]]
        ids = np.stack([model.tokenizer.pack(one, c.text_length) for one in pieces])
        best = answer(network, *clips.batch([i for i, _ in part]), ids)
        said = [kept[j] if j < len(kept) else "" for j in np.asarray(best)]
        right += [
            word == clips.scenes[i].things[k].colour
            for word, (i, k) in zip(said, part, strict=True)
        ]
    return np.array(right)


def probe_colours(model: Model, train: probing.Clips, test: probing.Clips) -> Iterator[str]:
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
    yield f"| color of a named thing ({len(colours['test'])}) predicted from | % |\n|---|---|"
    for what, label in (
        ("patches", "patches in its true box, which objects are made of"),
        ("frames", "frame tokens, weights for each shape"),
        ("trajectory", "the trajectory of its class, as fusion reads it"),
    ):
        predicted = probing.scores(found["train"][what], targets, found["test"][what]).argmax(1)
        yield f"| {label} | {probing.percent(predicted == colours['test'])} |"
    yield f"| the answer head | {probing.percent(answered(model, *asked['test']))} |"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    probing.add_arguments(parser)
    parser.add_argument("--steps", type=int, default=LABEL_STEPS, help="steps on labels; 0: off")
    parser.add_argument("--colors", action="store_true", help="also probe colors of named objects")
    args = parser.parse_args(argv)
    began = time.monotonic()
    model = stoa_jax.load(args.checkpoint)
    network = model.whole
    if network is None or not network.config.objects:
        parser.error(f"--checkpoint: {args.checkpoint} has no trajectory encoder to probe")
    train, test = (
        probing.draw(network, split, count, args.max_objects)
        for split, count in (("train", args.train), ("test", args.test))
    )
    fresh = probing.untrained(network, args.seed)
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
