"""Measure the time and memory of loading full-size weights.

    python -m benchmarks.load [--kind=…]

Files of random weights are written to a temporary folder first. Each is loaded in a separate
process by `weights.initial_parameters`, as a run with `--config.init.path` does, or by
`stoa_jax.load`. Peak memory is that of the process, imports included.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from stoa_jax.models.config import ModelConfig
from stoa_jax.weights import clip, parameter_shapes, released
from stoa_jax.weights.tables import write_table

KINDS = ("hugging_face", "openai", "open_clip", "released")
_LOAD = r"""
import re, sys, time
from stoa_jax import weights
from stoa_jax.models.config import ModelConfig
from stoa_jax.inference.loading import load
path, how = sys.argv[1:]
start, busy = time.perf_counter(), time.process_time()
if how == "load":
    load(path)
else:
    c, _ = weights.config_of(path)
    weights.initial_parameters(path, c)
wall, busy = time.perf_counter() - start, time.process_time() - busy
# Not ru_maxrss, which starts at the parent's peak.
peak = int(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1]) / 2**20
print(f"{how:18} {wall:6.1f} s  {busy:6.1f} s of processor  {peak:5.2f} GiB")
"""


def random_parameters(c: ModelConfig) -> dict[str, np.ndarray]:
    """Return random weights of the right shapes."""
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(c)
    return {n: 0.02 * rng.standard_normal(s, np.float32) for n, s in shapes.items()}


def write(kind: str, variant: str, folder: Path) -> Path:
    """Write a file of `kind` with random weights, and return its path."""
    c = getattr(ModelConfig, variant)()
    if kind == "released":
        import torch

        tensors = write_table(released.TABLE, random_parameters(c.released()))
        state = {name: torch.from_numpy(x) for name, x in tensors.items()}
        torch.save({"model_state_dict": state}, folder / "stoa.bin")
        return folder / "stoa.bin"
    params = random_parameters(clip.vision_and_text(c))
    if kind == "hugging_face":
        from stoa_jax.weights.hugging_face import save_hugging_face

        save_hugging_face(folder / "clip", params, c)
        return folder / "clip"
    import torch

    tensors = {n: torch.from_numpy(x) for n, x in write_table(clip.OPENAI, params).items()}
    if kind == "open_clip":
        torch.save(tensors, folder / "open_clip_quickgelu.bin")
        return folder / "open_clip_quickgelu.bin"

    class Node(torch.nn.Module):
        def forward(self, x):
            return x

    root = Node()
    for name, x in tensors.items():
        node = root
        *parents, last = name.split(".")
        for parent in parents:
            if not hasattr(node, parent):
                node.add_module(parent, Node())
            node = getattr(node, parent)
        node.register_parameter(last, torch.nn.Parameter(x.half()))
    path = folder / "clip.pt"
    torch.jit.script(root).save(str(path))
    return path


def main() -> None:
    """Write the files, load them, and print time and memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--variant", default="")
    args = parser.parse_args()
    for kind in [args.kind] if args.kind else KINDS:
        variant = args.variant or ("base" if kind == "released" else "large14_336")
        with tempfile.TemporaryDirectory() as name:
            path = write(kind, variant, Path(name))
            for how in ("initial_parameters", "load"):
                ran = subprocess.run(
                    [sys.executable, "-c", _LOAD, path, how], capture_output=True, text=True
                )
                last = (ran.stdout or ran.stderr).strip().splitlines()[-1]
                print(f"{kind:13} {variant:12} {last}", flush=True)


if __name__ == "__main__":
    main()
