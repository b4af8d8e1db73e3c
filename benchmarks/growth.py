"""Count how the work of a training step grows with devices and with the sizes of the input.

    python -m benchmarks.growth [--smoke]

Nothing is run or compiled: the real step with its six losses is traced, and the FLOPs of its matrix
products are counted. The first table has meshes of 1 to 512 virtual devices with 4 clips for each
device; the size of one device's state follows from the shardings. In the second table, one of T, N,
K and L grows, and the exponent of the last doubling is shown. Attention grows with the square of
the positions, and everything else linearly.
"""

import argparse
import math
import os
import time

import jax

from benchmarks import timing
from stoa_jax import config, plan, program, tasks
from stoa_jax.cost import jaxpr_work

DEVICES = 512  # virtual

# What grows: the fields of config.model and their values.
SIZES = {
    "T, frames": ("frames", (4, 16, 32, 64)),
    "N, trajectories": ("trajectories", (5, 20, 40)),
    "K, objects a frame": ("objects_per_frame", (5, 20, 40)),
    "L, text positions": ("text_length", (16, 32, 64)),
}


def traced(variant: str, devices: int, clips: int, fsdp: int = 1, **model: int):
    """Return the traced step of a configuration, and its program."""
    c = config.default("pretrain", variant)
    c.model.update(model)
    c.train.batch_size = clips
    c.mesh.fsdp = fsdp
    task = tasks.make_task(c)
    made = program.make_program(c, task, 100, devices=jax.devices()[:devices])
    with jax.set_mesh(made.mesh):
        return made.step.trace(made.state, plan.abstract_batch(task, clips)), made


def flops(*args, **kwargs) -> float:
    """Return the FLOPs of a step over all devices."""
    return jaxpr_work(traced(*args, **kwargs)[0].jaxpr.jaxpr).flops


def by_devices(variant: str, counts: tuple[int, ...], per_device: int = 4) -> list[list[object]]:
    """Return rows of devices, clips, and GFLOP and MiB of state per device."""
    rows = []
    for count in counts:
        step, made = traced(variant, count, per_device * count, fsdp=min(count, 8))
        work = jaxpr_work(step.jaxpr.jaxpr).flops / count
        state = sum(
            math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf, sharding in zip(
                jax.tree.leaves(made.state), jax.tree.leaves(made.shardings), strict=True
            )
        )
        rows.append([count, per_device * count, f"{work / 1e9:.1f}", f"{state / 2**20:.1f}"])
    return rows


def by_size(variant: str, name: str, values: tuple[int, ...]) -> list[object]:
    """Return a row with the GFLOP per clip at each value and the exponent of the last doubling."""
    field, _ = SIZES[name]
    found = [flops(variant, 1, 2, **{field: value}) / 2 for value in values]
    exponent = math.log(found[-1] / found[-2]) / math.log(values[-1] / values[-2])
    shown = ", ".join(f"{v}: {f / 1e9:.4g}" for v, f in zip(values, found, strict=True))
    return [name, shown, f"{exponent:.2f}"]


def main(argv: list[str] | None = None) -> dict[str, list]:
    """Print both tables and return their rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="toy sizes, to see that it runs")
    args = parser.parse_args(argv)
    variant = "tiny" if args.smoke else "base"
    counts = (1, 2) if args.smoke else (1, 8, 64, DEVICES)
    # JAX reads this when it is first used, which has not happened yet.
    flag = f"--xla_force_host_platform_device_count={counts[-1]}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    began = time.perf_counter()
    devices = by_devices(variant, counts)
    timing.table(["devices", "clips", "GFLOP a device", "MiB of state a device"], devices)
    sizes = [
        by_size(variant, name, values[:2] if args.smoke else values)
        for name, (_, values) in SIZES.items()
    ]
    timing.table(["what grows", "GFLOP a clip", "exponent at the end"], sizes)
    print(f"{timing.environment('jax')}; {time.perf_counter() - began:.0f} s")
    return {"devices": devices, "sizes": sizes}


if __name__ == "__main__":
    main()
