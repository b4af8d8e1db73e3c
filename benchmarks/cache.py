"""Measure batches from cached clips: `data.cache` in memory and on the accelerators.

    python -m benchmarks.cache [--clips=600] [--rounds=15] [--smoke]

Builds a part of the synthetic world (4 frames of 64x64, read at 48). In memory, it measures clips
per second of processor time on one core, and checks that cached batches are byte-identical to
uncached ones. On eight virtual CPU devices, it compares frames that are sharded over the devices
with a full copy on each. Both gather the same rows; with sharding, the devices exchange the frames
in a reduce-scatter.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks import timing
from stoa_jax import sharding
from stoa_jax.cost import collectives
from stoa_jax.data import builders, pipeline
from stoa_jax.data.build.run import build
from stoa_jax.data.device_frames import _gather

BATCH = 128


def same_bytes(one: dict, two: dict) -> None:
    """Assert that two batches are byte-identical."""
    assert one.keys() == two.keys()
    for name in one:
        assert np.asarray(one[name]).tobytes() == np.asarray(two[name]).tobytes(), name


def from_memory(split: pipeline.Split, rounds: int) -> dict[str, float]:
    """Return clips per second of processor time for each kind of cache and crop."""
    passes = max(1, len(split) // BATCH)
    sides: dict[str, Callable[[], object]] = {}
    for cache in ("off", "memory", "device"):
        for crop, flip in (("center", False), ("center", True), ("random", False)):
            if cache == "device" and crop == "random":
                continue
            spec = pipeline.BatchSpec(
                frames=4,
                image_size=48,
                objects=6,
                text_length=24,
                vocab_size=8192,
                crop=crop,
                flip=flip,
            )
            loader = pipeline.Loader(split, spec, BATCH, threads=1, cache=cache)
            if cache == "memory":
                plain = pipeline.Loader(split, spec, BATCH, threads=1, cache="off")
                for step in (0, 1, 0):
                    same_bytes(plain.batch(step), loader.batch(step))
            name = f"cache={cache}, {crop} crop{', mirrored at random' if flip else ''}"
            sides[name] = lambda loader=loader: [loader.batch(i) for i in range(passes)]
    seconds = timing.in_turn(sides, rounds, time.process_time)
    return {name: passes * BATCH / s for name, s in seconds.items()}


def on_devices(rounds: int, clips: int) -> list[list[object]]:
    """Return table rows for sharded and copied frames: time, memory, and bytes from collectives."""
    mesh = jax.make_mesh((8, 1, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    rng = np.random.default_rng(0)
    shape = (clips, 4, 48, 48, 3)
    frames = rng.integers(0, 256, shape, np.uint8)
    rows = rng.integers(0, clips, BATCH).astype(np.int32)
    split = sharding.batch_sharding(mesh)
    copied = NamedSharding(mesh, PartitionSpec())
    by_row = jax.device_put(rows, split)
    sharded, copies = jax.device_put(frames, split), jax.device_put(frames, copied)

    @jax.jit
    def look_up(frames: jax.Array, rows: jax.Array) -> jax.Array:
        local = jax.shard_map(
            lambda f, r: jnp.take(f, r, 0),
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec(sharding.BATCH_AXES)),
            out_specs=PartitionSpec(sharding.BATCH_AXES),
            check_vma=False,
        )
        return local(frames, rows)

    exchange = _gather(mesh)
    sides = {
        "sharded": lambda: exchange(sharded, by_row, None).block_until_ready(),
        "a copy on each": lambda: look_up(copies, by_row).block_until_ready(),
    }
    for run in sides.values():
        np.testing.assert_array_equal(run(), frames[rows])
    seconds = timing.in_turn(sides, rounds)
    text = exchange.lower(sharded, by_row, None).compile().as_text()
    moved = sum(c.bytes for c in collectives(text))
    size = frames.nbytes / 2**20
    return [
        ["sharded over 8", f"{1e3 * seconds['sharded']:.2f}", f"{size / 8:.1f}", f"{moved}"],
        ["a copy on each", f"{1e3 * seconds['a copy on each']:.2f}", f"{size:.1f}", "0"],
    ]


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Print both tables, and return clips per second for each kind of cache and crop."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--smoke", action="store_true", help="few clips, to see that it runs")
    args = parser.parse_args(argv)
    clips, rounds = (BATCH, 2) if args.smoke else (args.clips, args.rounds)
    print(timing.environment("jax", "numpy"))
    # JAX reads this when it is first used, which has not happened yet.
    flag = "--xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    with tempfile.TemporaryDirectory() as scratch:
        settings = builders.Settings(frames=4, objects=6, short_side=48, tagger="none")
        options = {"train": clips, "validation": 1, "test": 1}
        build("synthetic/captions", Path(scratch), settings=settings, options=options)
        split = pipeline.open_split(scratch, "synthetic/captions", "train")
        found = from_memory(split, rounds)
    timing.table(
        ["batches of 128, one core", "clips/s of processor time"],
        [[name, f"{rate:,.0f}"] for name, rate in found.items()],
    )
    timing.table(
        [f"gather {BATCH} of {clips} clips", "ms", "MiB a device", "bytes from collectives"],
        on_devices(rounds, clips // 8 * 8),
    )
    return found


if __name__ == "__main__":
    main()
