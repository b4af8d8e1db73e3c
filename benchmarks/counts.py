"""Count the memory, FLOPs and transposes of the training step, now and at an older commit.

    python -m benchmarks.counts --commit=7ef1078

Needs no accelerator. All counts are of `base` in bfloat16 with six losses: the bytes that a block
of the vision transformer keeps for the backward pass, the FLOPs, and the transposes in the program
lowered for CUDA.
"""

import argparse
import inspect
import math
import re
import subprocess
import sys

import jax
from flax import nnx

from benchmarks import setting
from benchmarks.older import checkout, environment
from stoa_jax.cost import jaxpr_work
from stoa_jax.models import layers
from stoa_jax.models.config import ModelConfig


def saved_bytes(c: ModelConfig) -> int:
    """Return the bytes per clip that one block of the vision tower keeps for the backward pass."""
    width, length = c.vision_width, c.grid**2 + 1
    blocks = jax.eval_shape(
        lambda: layers.stack(1, width, c.vision_heads, activation=c.activation, rngs=nnx.Rngs(0))
    )
    x = jax.ShapeDtypeStruct((1, length, width), c.dtype)

    def backward(blocks, x):
        run = layers.run_blocks
        return jax.vjp(lambda b, x: run(b, x, scan=False, remat=c.remat), blocks, x)[1]

    kept = jax.jit(backward).trace(blocks, x).jaxpr.jaxpr.outvars
    # Everything else is a parameter or a copy of one, which is kept once for all clips.
    kept = {v for v in kept if length in v.aval.shape}
    return c.frames * sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in kept)


CLIPS = 17  # divides no other axis, so the axes that grow with the batch can be recognised


def transposes(lowered: str) -> tuple[int, int]:
    """Return how many transposes a lowered program has, and how many of them move activations.

    The others move parameters, and their number does not depend on the batch size.
    """
    moved = re.findall(r"stablehlo\.transpose .*-> tensor<([\dx]*)", lowered)
    shapes = [[int(n) for n in shape.split("x") if n] for shape in moved]
    return len(shapes), sum(any(n % CLIPS == 0 for n in shape) for shape in shapes)


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--commit", default="", help="also count at this commit")
    args = parser.parse_args()
    if args.commit:
        with checkout(args.commit) as tree:
            print(f"{args.commit}:", flush=True)
            command = [sys.executable, "-m", "benchmarks.counts"]
            subprocess.run(command, cwd=tree, env=environment(tree), check=True)
        print("now:")
    options = [value for value in ("none", "dots", "products", "full") if _known(value)]
    for remat in options:
        c = setting.model_config("base", dtype="bfloat16", remat=remat, scan_layers=False)
        print(f"  a ViT block keeps {saved_bytes(c) / 1e6:7.1f} MB of a clip, remat={remat}")
    c = setting.model_config("base", dtype="bfloat16", scan_layers=False)
    batch, config = setting.random_batch(c, CLIPS), setting.step_config(CLIPS)
    program, _ = setting.our_program(c, config, jax.devices()[0])
    traced = program.step.trace(program.state, setting.abstract(batch))
    flops = jaxpr_work(traced.jaxpr.jaxpr).flops / CLIPS
    print(f"  {flops / 1e9:,.1f} GFLOP of matrix products a clip", flush=True)
    if "keep" in inspect.signature(layers.Block.__call__).parameters:
        from benchmarks.sides import nominal_work

        nominal = nominal_work(c, config, batch).flops / CLIPS
        print(f"  {nominal / 1e9:,.1f} GFLOP if every layer computed all positions", flush=True)
    found = transposes(traced.lower(lowering_platforms=("cuda",)).as_text())
    print(f"  {found[0]} transposes lowered for CUDA, {found[1]} of them of activations")


def _known(remat: str) -> bool:
    return remat in str(inspect.get_annotations(ModelConfig)["remat"])


if __name__ == "__main__":
    main()
