"""Measure time and memory of each shipped configuration on the synthetic world.

    python -m benchmarks.configs [--workdir=runs/configs] [--smoke]

Builds the demo's data sets, unless they exist, and then runs each configuration as its docstring
says, each in its own process: a small CLIP, pre-training from it, and four fine-tunings. The time
is by the clock and includes the start, compilation and one evaluation by greedy decoding, of the
fine-tunings on the test split. The memory is the largest resident set of the process.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from benchmarks import timing
from stoa_jax.demo import full

SCORES = {
    "clip": ("retrieval/t2v/R@1",),
    "pretrain": ("retrieval/t2v/R@1", "retrieval/reranked/t2v/R@1"),
    "retrieval": ("retrieval/t2v/R@1", "retrieval/reranked/t2v/R@1"),
    "captioning": ("captioning/greedy/CIDEr", "captioning/greedy/BLEU-4"),
    "qa": ("qa/accuracy",),
    "multiple_choice": ("multiple_choice/accuracy",),
}


def command(name: str, workdir: Path, data: Path, smoke: bool) -> list[str]:
    """Return the command of a configuration's docstring; a fine-tuning is evaluated on tests."""
    flags = [
        f"--config=configs/{name}.py:synthetic",
        f"--workdir={workdir / name}",
        f"--config.data.dir={data}",
        "--config.eval.beam=1",
    ]
    if name in full.TASKS:
        flags += [
            f"--config.init.path={workdir / 'pretrain'}",
            "--config.eval.every_steps=0",
            "--config.data.eval_split=test",
        ]
    elif name == "pretrain":
        flags.append(f"--config.init.path={workdir / 'clip-hf'}")
    if smoke:
        flags.append("--config.train.steps=2")
    return [sys.executable, "-m", "stoa_jax.main", *flags]


def measured(arguments: list[str], log: Path) -> tuple[float, float]:
    """Run a program; return its seconds and the GiB of its largest resident set."""
    began = time.perf_counter()
    with log.open("ab") as file:
        actions = [(os.POSIX_SPAWN_DUP2, file.fileno(), 1), (os.POSIX_SPAWN_DUP2, file.fileno(), 2)]
        process = os.posix_spawn(arguments[0], arguments, os.environ, file_actions=actions)
    _, status, usage = os.wait4(process, 0)
    if status:
        raise SystemExit(f"error: {' '.join(arguments)} failed; see {log}")
    return time.perf_counter() - began, usage.ru_maxrss / 2**20


def main(argv: list[str] | None = None) -> None:
    """Build, run every configuration, and print a row of each as it ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/configs"))
    parser.add_argument("--smoke", action="store_true", help="few clips and steps")
    args = parser.parse_args(argv)
    workdir, data = args.workdir, args.workdir / "data"
    workdir.mkdir(parents=True, exist_ok=True)
    print(timing.environment("jax"), flush=True)
    full.build(data, processes=2, clips=0.01 if args.smoke else 1.0)
    timing.table(["configuration", "minutes", "GiB", "scores"], [])
    for name in ("clip", "pretrain", *full.TASKS):
        arguments = command(name, workdir, data, args.smoke)
        seconds, memory = measured(arguments, workdir / f"{name}.log")
        result = json.loads((workdir / name / "result.json").read_text())
        scores = [f"{k} {result[f'eval/{k}']:.3g}" for k in SCORES[name] if f"eval/{k}" in result]
        row = [name, f"{seconds / 60:.1f}", f"{memory:.1f}", ", ".join(scores)]
        print("| " + " | ".join(row) + " |", flush=True)
        if name == "clip":
            full.convert(workdir / name, workdir / "clip-hf")


if __name__ == "__main__":
    main()
