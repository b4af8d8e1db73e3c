"""Test whether one frame is enough in the synthetic world, by a probe on one and on all frames.

    python -m benchmarks.single_frame

The probe predicts which of 15 motions a clip with a single event shows. The same convolutional
network reads either the middle frame or all frames (their differences as channels). Chance is the
most frequent motion of the training clips. A second test measures how often appearance alone finds
the clip of a caption among N test clips: objects and background are known exactly, motion not at
all.
"""

import argparse
import collections
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stoa_jax.data.synthetic import World, motion, render
from stoa_jax.data.synthetic.scene import MOTIONS

SIZE, FRAMES = 32, 6


def clips(split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Generate clips with one event: pixels uint8 [n, T, S, S, 3] and motions [n]."""
    world, pixels, labels, index = World(split, size=SIZE, frames=FRAMES), [], [], 0
    while len(pixels) < count:
        scene = world.scene(index)
        index += 1
        if len(scene.events) == 1:
            rng = np.random.default_rng([7, index])
            tracks = motion.lay_out(scene, FRAMES, rng)
            pixels.append(render.draw(scene, tracks, SIZE, rng)[0])
            labels.append(MOTIONS.index(scene.events[0].motion))
    return np.stack(pixels), np.array(labels, np.int32)


def view(pixels: jax.Array, which: str) -> jax.Array:
    """Return [n, S, S, C]: the middle frame, and with `all frames` also the frames' differences."""
    frames = pixels.astype(jnp.float32) / 127.5 - 1
    middle = frames[:, FRAMES // 2]
    if which == "middle frame":
        return middle
    change = jnp.moveaxis(frames[:, 1:] - frames[:, :-1], 1, -1)
    return jnp.concatenate([middle, change.reshape(*change.shape[:3], -1)], -1)


def init(key: jax.Array, channels: int) -> dict[str, jax.Array]:
    """Initialise four convolutions and two dense layers."""
    widths = (channels, 32, 48, 64, 64)
    keys = jax.random.split(key, 6)
    params = {
        f"conv{i}": jax.random.normal(keys[i], (3, 3, a, b)) * (2 / (9 * a)) ** 0.5
        for i, (a, b) in enumerate(itertools.pairwise(widths))
    }
    flat = 64 * (SIZE // 8) ** 2
    params["hidden"] = jax.random.normal(keys[4], (flat, 128)) * (2 / flat) ** 0.5
    params["out"] = jnp.zeros((128, len(MOTIONS)))
    return params


def logits(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Return logits [n, motions] of images [n, S, S, C]."""
    for i in range(4):
        stride = (1, 1) if i == 3 else (2, 2)
        x = jax.lax.conv_general_dilated(
            x, params[f"conv{i}"], stride, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x)
        x = (x - x.mean((1, 2, 3), keepdims=True)) / (x.std((1, 2, 3), keepdims=True) + 1e-3)
    return jax.nn.relu(x.reshape(len(x), -1) @ params["hidden"]) @ params["out"]


def probe(which: str, train, test, steps: int, seed: int) -> float:
    """Train the probe and return its test accuracy."""
    pixels, labels = map(jnp.asarray, train)
    params = init(jax.random.key(seed), view(pixels[:1], which).shape[-1])
    schedule = optax.cosine_decay_schedule(2e-3, steps)
    optimizer = optax.adamw(schedule, weight_decay=0.05)

    @jax.jit
    def step(params, state, key):
        rows = jax.random.randint(key, (128,), 0, len(labels))

        def loss(params):
            out = logits(params, view(pixels[rows], which))
            return optax.softmax_cross_entropy_with_integer_labels(out, labels[rows]).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for i in range(steps):
        params, state = step(params, state, jax.random.fold_in(jax.random.key(seed + 1), i))
    best = jax.jit(lambda p, x: logits(p, view(x, which)).argmax(-1))(params, jnp.asarray(test[0]))
    return float((np.asarray(best) == test[1]).mean())


def looks_alone(count: int) -> float:
    """Return R@1 over `count` test clips by exact appearance, without any motion."""
    world = World("test")
    looks = collections.Counter(
        (scene.things, scene.background) for scene in map(world.scene, range(count))
    )
    return len(looks) / count  # a guess among m clips that look the same is right once in m


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=int, default=6000)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    start = time.time()
    train, test = clips("train", args.train), clips("test", args.test)
    print(f"{args.train} + {args.test} clips drawn in {time.time() - start:.0f} s")
    common = np.bincount(train[1]).argmax()
    print(f"| most frequent motion | {100 * (test[1] == common).mean():.1f} % |")
    for which in ("middle frame", "all frames"):
        start = time.time()
        scores = [100 * probe(which, train, test, args.steps, seed) for seed in range(args.seeds)]
        listed = ", ".join(f"{score:.1f}" for score in scores)
        print(f"| {which} | {listed} % | {time.time() - start:.0f} s |", flush=True)
    print(f"| R@1 of 200 by exact looks alone | {100 * looks_alone(200):.1f} % |")


if __name__ == "__main__":
    main()
