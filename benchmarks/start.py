"""Time the start: the import, the first vector of a new process, a second start with a cache.

    python -m benchmarks.start [--rounds=5] [--smoke]

- `import stoa_jax` in a new process, minus the start of Python itself.
- A new process that loads a Hugging Face directory (ViT-B/16 with random weights) and embeds one
  video file, by stoa_jax, with and without JAX's compilation cache, and by transformers with torch
  and PyAV.
- A new process that compiles the training step of a variant, and a second one that finds it in the
  compilation cache.
"""

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from benchmarks import timing
from benchmarks.loader import write_video
from stoa_jax.inference.programs import Towers
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.parameters import named_parameters
from stoa_jax.weights import hugging_face

OURS = """
import sys, stoa_jax
model = stoa_jax.load(sys.argv[1])
print(model.encode_video([sys.argv[2]]).shape)
"""
THEIRS = """
import sys, av, torch
from transformers import CLIPImageProcessor, CLIPModel
model = CLIPModel.from_pretrained(sys.argv[1]).eval()
process = CLIPImageProcessor(size={"shortest_edge": int(sys.argv[3])},
                             crop_size=dict.fromkeys(("height", "width"), int(sys.argv[3])))
with av.open(sys.argv[2]) as file:
    frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
count = int(sys.argv[4])
taken = [frames[int((i + 0.5) * len(frames) / count)] for i in range(count)]
with torch.inference_mode():
    found = model.get_image_features(**process(taken, return_tensors="pt"))
    found = getattr(found, "pooler_output", found)
    found = torch.nn.functional.normalize(found, dim=-1).mean(0)
print(found.shape)
"""
STEP = """
import sys, time
import jax
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
from stoa_jax import config, plan, program, tasks
c = config.default("pretrain", sys.argv[2])
c.train.batch_size = 2
task = tasks.make_task(c)
made = program.make_program(c, task, steps=100)
with jax.set_mesh(made.mesh):
    made.step.lower(made.state, plan.abstract_batch(task, 2)).compile()
"""


def seconds_of(code: str, *arguments: str, **environment: str) -> float:
    """Return the seconds that a new process takes to start, run this code and exit."""
    began = time.perf_counter()
    ran = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
    )
    took = time.perf_counter() - began
    if ran.returncode:
        raise RuntimeError(ran.stderr[-2000:])
    return took


def write_clip(folder: Path, c: ModelConfig) -> None:
    """Write a CLIP with random weights as a Hugging Face directory."""
    towers = jax.jit(lambda: Towers(c, rngs=nnx.Rngs(0)))()
    params = {name: np.asarray(x) for name, x in named_parameters(towers).items()}
    hugging_face.save_hugging_face(folder, params, c)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Measure everything, print the table, and return the medians in seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--variant", default="base", help="variant whose training step is compiled")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, to see that it runs")
    args = parser.parse_args(argv)
    rounds = 1 if args.smoke else args.rounds
    c = dataclasses.replace(
        ModelConfig.tiny() if args.smoke else ModelConfig.base(),
        objects=False,
        actions=False,
        masked_text="zero",
    )
    if args.smoke:  # head widths that a CLIP directory allows
        small = dict(vision_width=64, vision_heads=1, text_width=64, text_heads=1, fusion_heads=1)
        c = dataclasses.replace(c, **small)
    with tempfile.TemporaryDirectory() as scratch:
        folder, video, cache = (str(Path(scratch) / n) for n in ("clip", "clip.mp4", "cache"))
        write_clip(Path(folder), c)
        write_video(Path(video), 0, seconds=2 if args.smoke else 10)
        sides = {
            "python -c pass": lambda: seconds_of("pass"),
            "import stoa_jax": lambda: seconds_of("import stoa_jax"),
            "first vector, stoa_jax": lambda: seconds_of(OURS, folder, video),
            "first vector, stoa_jax, compilation cache": lambda: seconds_of(
                OURS,
                folder,
                video,
                JAX_COMPILATION_CACHE_DIR=cache,
                JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
            ),
        }
        if timing.installed("torch", "transformers"):
            sides["first vector, transformers + torch"] = lambda: seconds_of(
                THEIRS, folder, video, str(c.image_size), str(c.frames)
            )
        for run in sides.values():
            run()  # file caches, and the compilation cache
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, run in sides.items():
                times[name].append(run())
        found = {name: statistics.median(values) for name, values in times.items()}
        found["import stoa_jax"] -= found.pop("python -c pass")
        if not args.smoke:
            steps = str(Path(scratch) / "steps")
            for name in ("first", "second"):
                found[f"{name} start, training step of {args.variant}"] = seconds_of(
                    STEP, steps, args.variant
                )
    print(timing.environment("jax", "torch", "transformers"))
    timing.table(["new process", "s"], [[name, f"{s:.2f}"] for name, s in found.items()])
    return found


if __name__ == "__main__":
    main()
