"""Compare the training step at an older commit with today's, in turn, in one run.

    python -m benchmarks.before_after --commit=7ef1078 --without=mlm

The older commit is checked out into a temporary worktree. Each side runs in its own process, and
only one of them works at a time. Both start from the older commit's parameters and use the same
batch and random choices. In the first step, each loss must agree to within a relative 1e-5. If the
definition of a loss has changed since (MLM's has, since 7ef1078), switch it off on both sides with
`--without=mlm`, or allow it to differ with `--differ=mlm`.

    python -m benchmarks.before_after --commit=7ef1078 --without=mlm --language=131

With `--language=N`, captions use N of the vocabulary's ids, and the biases of all others make them
impossible on both sides. Then today's step uses `loss.seen_words`, as `configs/joint.py` does, at
equal losses.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.older import ROOT, checkout, environment


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--commit", default="7ef1078")
    parser.add_argument("--size", default="tiny", help="toy, or a variant of ModelConfig")
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=5, help="steps of each side per round")
    parser.add_argument("--without", default="", help="losses to switch off, comma-separated")
    parser.add_argument("--differ", default="", help="losses that may differ, comma-separated")
    parser.add_argument("--language", type=int, help="number of ids in the captions")
    parser.add_argument("--all-learn", action="store_true", help="train the vision tower too")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seen-words", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


class Worker:
    """A process that runs the step of one tree of the code."""

    def __init__(self, tree: Path, options: list[str]):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.before_after", "--worker", *options],
            cwd=tree,
            env={**environment(tree), "JAX_PLATFORMS": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, **request: Any) -> dict[str, Any]:
        """Send a request and return the answer."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("one side failed; its error is above")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def work(args: argparse.Namespace) -> None:
    """Answer requests on standard input to save or load parameters and to take steps."""
    import jax

    from benchmarks import setting

    c = setting.model_config(args.size, scan_layers=False)
    losses = dict.fromkeys(filter(None, args.without.split(",")), 0.0)
    groups = setting.EVERYTHING if args.all_learn else setting.FROZEN_VISION
    config = setting.step_config(args.clips, groups=groups, **losses)
    language = args.language if args.seen_words else None
    program, _ = setting.our_program(c, config, jax.devices()[0], language=language)
    batch = jax.device_put(setting.random_batch(c, args.clips, language=args.language))
    state = None
    for line in sys.stdin:
        request = json.loads(line)
        if "save" in request:
            params = {k: np.array(v) for k, v in program.init().params.items()}
            if args.language:
                used = setting.language_ids(c, args.language)
                params["fusion/lm_bias"][np.setdiff1d(np.arange(c.vocab_size), used)] = -1e9
            np.savez(request["save"], **params)
            answer = {}
        elif "load" in request:
            with np.load(request["load"]) as file:
                params = dict(file)
            if set(params) != set(program.state.params):
                from stoa_jax.migrations import migrate_parameters

                shapes = {k: v.shape for k, v in program.state.params.items()}
                params = migrate_parameters(params, shapes)
            state = program.start(params)
            answer = {}
        else:
            seconds = []
            for _ in range(request["steps"]):
                start = time.perf_counter()
                state, values = program.step(state, batch)
                metrics = setting.metrics_by_name(program, values)
                seconds.append(time.perf_counter() - start)
            found = {k: v for k, v in metrics.items() if k.startswith("loss_")}
            answer = {"seconds": seconds, "losses": found}
        print(json.dumps(answer), flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Compare both sides, and print a line per round and then the medians."""
    args = parse(arguments)
    if args.worker:
        return work(args)
    options = [f"--{k}={getattr(args, k)}" for k in ("size", "clips", "without")]
    options += ["--all-learn"] * args.all_learn
    options += [f"--language={args.language}"] if args.language else []
    with checkout(args.commit) as tree, tempfile.TemporaryDirectory() as folder:
        params = str(Path(folder) / "params.npz")
        compare(args, Worker(tree, options), Worker(ROOT, [*options, "--seen-words"]), params)


def compare(args: argparse.Namespace, before: Worker, after: Worker, params: str) -> None:
    """Check that the losses of both sides agree, then time the sides in turn."""
    before(save=params)
    before(load=params)
    after(load=params)
    old, new = before(steps=1)["losses"], after(steps=1)["losses"]  # compiles
    allowed = {f"loss_{name}" for name in args.differ.split(",")}
    for name, value in old.items():
        difference = abs(new[name] - value) / abs(value)
        print(
            f"{name}: {value:.6f} before, {new[name]:.6f} now, {difference:.1e} apart", flush=True
        )
        if difference > 1e-5 and name not in allowed:
            raise SystemExit(f"{name} differs by more than 1e-5; see --without and --differ")
    times: tuple[list[float], list[float]] = [], []
    for _ in range(args.rounds):
        for worker, seconds in zip((before, after), times, strict=True):
            seconds += worker(steps=args.steps)["seconds"]
        one = (args.clips / statistics.median(s[-args.steps :]) for s in times)
        print("clips/s: {:.1f} before, {:.1f} now".format(*one), flush=True)
    for worker in (before, after):
        worker.close()
    speeds = [args.clips / statistics.median(seconds) for seconds in times]
    print(
        f"{args.size}, {args.clips} clips, without {args.without or 'nothing'}, median of "
        f"{len(times[0])} steps each: {speeds[0]:.1f} clips/s at {args.commit}, {speeds[1]:.1f} "
        f"now, {speeds[1] / speeds[0]:.2f} times"
    )


if __name__ == "__main__":
    main()
