"""Interrupt a run at random moments, and compare it bit for bit with an uninterrupted one.

    python benchmarks/interrupt.py [--steps=300] [--interruptions=10] [--folder=/tmp/interrupt]

Both runs are the shipped pre-training on the synthetic set at reduced size, with all six losses,
evaluation and checkpoints. Half of the interruptions are SIGTERM (the run saves and exits), and
half are `kill -9`.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SMALL = {
    **{"model.image_size": 24, "model.patch_size": 8, "model.frames": 2, "model.roi_size": 2},
    **{"model.vision_width": 32, "model.vision_depth": 2, "model.vision_heads": 2},
    **{"model.text_width": 32, "model.text_depth": 2, "model.text_heads": 2},
    **{"model.vocab_size": 1024, "model.object_block": 2, "model.action_block": 2},
    **{"model.fusion_depth": 1, "model.fusion_heads": 2, "model.text_length": 16},
    **{"model.objects_per_frame": 4, "model.trajectories": 4, "model.action_tokens": 2},
    **{"train.batch_size": 8, "eval.batch_size": 8, "eval.max_examples": 16, "eval.rerank": 0},
    **{"checkpoint.every_steps": 20, "eval.every_steps": 100, "log.every_steps": 1},
    **{"data.workers": 0},
}


def command(workdir: Path, folder: Path, steps: int) -> list[str]:
    """Return the command that starts the run, as a user would type it."""
    flags = {**SMALL, "train.steps": steps, "data.dir": folder / "data"}
    return [
        *(sys.executable, "-m", "stoa_jax.main", "--config=configs/pretrain.py:synthetic"),
        f"--workdir={workdir}",
        *(f"--config.{key}={value}" for key, value in flags.items()),
    ]


def start(arguments: list[str], log: Path) -> subprocess.Popen:
    """Start a command in the repository; a compilation cache makes later starts faster."""
    kept = str(log.parent / "compiled")
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": kept}
    return subprocess.Popen(arguments, cwd=ROOT, env=env, stdout=open(log, "a"), stderr=-2)


def rows(workdir: Path) -> list[dict]:
    """Read metrics.jsonl without times and memory."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(("time/", "memory/"))}
        for line in lines
    ]


def step_of(workdir: Path) -> int:
    """Return the last step that was logged."""
    try:
        return json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, json.JSONDecodeError):
        return 0


def main() -> None:
    """Build the data, run once without and once with interruptions, and compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--interruptions", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/interrupt"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if not (args.folder / "data").exists():
        build = ["-m", "stoa_jax.data.build", "synthetic/captions", "--limit=64", "--quiet"]
        build += ["--frames=2", "--objects=4", "--short-side=32"]
        subprocess.run(
            [sys.executable, *build, f"--data-dir={args.folder / 'data'}"], cwd=ROOT, check=True
        )
    whole, pieces = args.folder / "whole", args.folder / "pieces"
    code = start(command(whole, args.folder, args.steps), args.folder / "whole.log").wait()
    assert code == 0, f"exit code {code}, see {args.folder}/whole.log"

    rng = random.Random(args.seed)
    # Each interruption has its own step; the moment within the step is random.
    ends = sorted(rng.sample(range(3, args.steps - 3), args.interruptions))
    happened = []
    for i, end in enumerate(ends):
        log = args.folder / "pieces.log"
        told = log.stat().st_size if log.exists() else 0
        process = start(command(pieces, args.folder, args.steps), log)
        # Wait for a new step: a killed run may already have logged rows beyond this end.
        while process.poll() is None and (
            step_of(pieces) < end or b"\nstep " not in log.read_bytes()[told:]
        ):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        kind = (signal.SIGTERM, signal.SIGKILL)[i % 2]
        process.send_signal(kind)
        code = process.wait()
        wanted = (0,) if kind == signal.SIGTERM else (-signal.SIGKILL,)
        assert code in wanted, f"exit code {code}, see {args.folder}/pieces.log"
        happened.append(f"{kind.name} at step {step_of(pieces)}: exit {code}")
        print(happened[-1], flush=True)
    code = start(command(pieces, args.folder, args.steps), args.folder / "pieces.log").wait()
    assert code == 0, f"exit code {code}, see {args.folder}/pieces.log"

    sys.path.insert(0, str(ROOT))
    from stoa_jax.checkpoint import load_params

    (a, _, meta_a), (b, _, meta_b) = load_params(whole), load_params(pieces)
    same = sum(a[name].tobytes() == b[name].tobytes() for name in a)
    sums = json.loads((whole / f"checkpoints/{args.steps}/meta/metadata").read_text())["checksums"]
    other = json.loads((pieces / f"checkpoints/{args.steps}/meta/metadata").read_text())
    equal = sum(other["checksums"][name] == value for name, value in sums.items())
    lines = rows(whole), rows(pieces)
    print(f"{same} of {len(a)} parameters, {equal} of {len(sums)} arrays with the optimizer's, and")
    print(f"{sum(x == y for x, y in zip(*lines, strict=False))} of {len(lines[0])} rows of metrics")
    print(f"({len(lines[1])} written by the interrupted run) are bit-identical")
    assert same == len(a) and equal == len(sums) and lines[0] == lines[1]
    assert meta_a["step"] == meta_b["step"] == args.steps


if __name__ == "__main__":
    main()
