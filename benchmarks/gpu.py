"""Run all benchmarks of the training step on one GPU, the most important first.

    bash benchmarks/gpu.sh [--dry-run]

The stages are: parity with PyTorch at the highest precision, our step as shipped, the twin under
torch.compile, both in turn, the slowest kernels, variants of our step, the time of each part, and
the twin with autotuned kernels. The variants compile in threads while the first stages run. A stage
that fails is reported in one line, and a stage that would not end in time is left out.
"""

import argparse
import dataclasses
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

# Variants of the shipped step, as changed fields of ModelConfig.
VARIANTS: dict[str, dict[str, Any]] = {
    "attention=xla": dict(attention="xla"),
    "attention=cudnn": dict(attention="cudnn"),
    "remat=products": dict(remat="products"),
    "attention=cudnn, remat=products": dict(attention="cudnn", remat="products"),
    "scanned layers": dict(scan_layers=True),
    "remat=dots": dict(remat="dots"),
}
# Variants of the twin, as options of `TwinStep`. Each takes about a minute to compile.
TWINS: dict[str, dict[str, str]] = {
    "twin, compiled": dict(compile="default", stream="bfloat16"),
    "twin, compiled, float32 between layers": dict(compile="default", stream="float32"),
    "twin, eager": dict(stream="bfloat16"),
}
AUTOTUNED = {"twin, max-autotune": dict(compile="max-autotune-no-cudagraphs", stream="bfloat16")}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="run on a CPU, at toy sizes")
    parser.add_argument("--clips", type=int, default=32, help="the batch")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each side")
    parser.add_argument("--seconds", type=float, default=525, help="time limit of the whole run")
    parser.add_argument("--threads", type=int, default=6, help="threads that compile")
    parser.add_argument("--out", default="runs/benchmarks/gpu.jsonl")
    args = parser.parse_args(arguments)
    if args.dry_run:
        args.clips, args.steps, args.threads = 4, 2, 2
    return args


class Run:
    """A run with a time limit."""

    def __init__(self, args: argparse.Namespace, results: Any):
        self.args, self.results = args, results
        self.deadline = time.monotonic() + args.seconds
        # A compilation cannot be interrupted, so the process exits. Finished results are on disk.
        timer = threading.Timer(args.seconds, self._end)
        timer.daemon = True
        timer.start()

    def _end(self) -> None:
        self.results.add("end", "out of time; all lines above are complete")
        os._exit(0)

    @property
    def left(self) -> float:
        """Seconds until the run ends."""
        return self.deadline - time.monotonic()

    def stage(self, name: str, work: Callable[[], Any], needs: float = 0.0) -> Any:
        """Run a stage and return its result, or None if it fails or too little time is left."""
        if not self.args.dry_run and self.left < needs:
            self.results.add(name, f"left out: {self.left:.0f} s left, {needs:.0f} s needed")
            return None
        try:
            return work()
        except Exception as error:
            line = (str(error).strip() or traceback.format_exc()).splitlines()[0][:200]
            text = f"failed: {type(error).__name__}: {line}"
            self.results.add(name, text, error=f"{type(error).__name__}: {line}")
            return None


def main(arguments: list[str] | None = None) -> None:
    """Run all stages."""
    args = parse(arguments)
    os.environ["JAX_PLATFORMS"] = "cpu" if args.dry_run else "cuda,cpu"
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    from benchmarks import parts, setting, sides
    from benchmarks.results import Results
    from stoa_jax.chips import chip_of

    command = " ".join(["python -m benchmarks.gpu", *(arguments or sys.argv[1:])])
    results = Results(args.out, command)
    run = Run(args, results)
    device = jax.devices()[0]
    size = "toy" if args.dry_run else "base"
    c = setting.model_config(size, dtype="bfloat16")
    config, batch = setting.step_config(args.clips), setting.random_batch(c, args.clips)
    variants, twin_options, autotuned = dict(VARIANTS), dict(TWINS), dict(AUTOTUNED)
    if args.dry_run:  # one of each kind; generating code for a CPU would take minutes
        variants = {name: VARIANTS[name] for name in ("attention=cudnn", "remat=products")}
        twin_options["twin, compiled"] = dict(compile="aot_eager", stream="bfloat16")
        del twin_options["twin, compiled, float32 between layers"]
        autotuned = {"twin, max-autotune": dict(compile="aot_eager", stream="bfloat16")}

    # Count in the scanned program, which is traced faster, before other threads start tracing.
    looped = dataclasses.replace(c, scan_layers=True)
    performed, nominal = sides.work_of_a_clip(looped, config, batch, args.clips, results)
    program, _ = setting.our_program(c, config, device)
    params = setting.random_parameters(program, std=0.02)
    pool = ThreadPoolExecutor(args.threads)

    def compiling(changes: dict[str, Any]) -> Future:
        step = sides.OurStep(
            dataclasses.replace(c, **changes), config, device, lambda: params, batch
        )
        return pool.submit(step.compile, setting.QUICK if args.dry_run else None)

    shipped = compiling({})
    # Skip variants that equal the shipped configuration.
    others = {
        name: compiling(changes)
        for name, changes in variants.items()
        if dataclasses.replace(c, **changes) != c
    }
    chip = chip_of(device.device_kind)

    def report(side: Any, note: str = "") -> None:
        speed = args.clips / side.median
        shares = {}
        if chip:
            shares = {"performed": speed * performed / chip.flops}
            shares["nominal"] = speed * nominal / chip.flops
        share = "".join(f", {v:.1%} of peak ({k})" for k, v in shares.items())
        results.add(
            side.name,
            f"{speed:.2f} clips/s, {side.median * 1e3:.2f} ms, median of {len(side.seconds)} "
            f"steps{share}{note}",
            clips_per_second=speed,
            median_s=side.median,
            steps=len(side.seconds),
            note=note,
            **{f"share_{k}": v for k, v in shares.items()},
        )

    def timed(side: Any, note: str = "") -> Any:
        loss = side.step()
        side.step()  # some caches are filled by the first step
        results.add(f"first loss, {side.name}", loss=round(loss, 4))
        for _ in sides.in_turn([side], 1, args.steps):
            pass
        report(side, note)
        return side

    while_compiling = " (while variants compile)"
    run.stage("parity", lambda: check_parity(device, results))

    def measure_ours() -> Any:
        step = shipped.result()
        gib = step.temporaries() / 2**30
        results.add("compiled: ours as shipped", seconds=round(step.compile_seconds, 1), GiB=gib)
        return timed(sides.Side("ours as shipped", step), while_compiling)

    ours = run.stage("ours as shipped", measure_ours)
    torch_device = "cpu" if args.dry_run else "cuda"
    twins = []

    def measure_twin(name: str, options: dict[str, str]) -> None:
        options = dict(options, device=torch_device)
        side = sides.twin_side(name, c, config, params, batch, **options)
        twins.append(timed(side, while_compiling))

    for name, options in twin_options.items():
        run.stage(name, lambda n=name, o=options: measure_twin(n, o), needs=120)

    def compare() -> None:
        for future in others.values():
            future.exception(timeout=max(run.left - 60, 1))  # wait until nothing compiles
        best = min(twins, key=lambda side: side.median)
        pair = [ours, best]
        for side in pair:
            side.seconds.clear()
        for _ in sides.in_turn(pair, 3, args.steps, run.deadline - 30):
            pass
        for side in pair:
            report(side, " (in turn)")
        ratio = best.median / ours.median
        results.add("ratio", f"ours is {ratio:.3f} times as fast as {best.name}", ratio=ratio)

    if ours is not None and twins:
        run.stage("ours and the twin in turn", compare, needs=40)
    twins.clear()
    release_torch()
    if ours is not None:
        run.stage("kernels", lambda: parts.report_kernels(ours.step, results), needs=30)
        ours.step.release()

    def measure_variant(name: str, future: Future) -> None:
        step = future.result(timeout=max(run.left - 10, 1))
        gib = step.temporaries() / 2**30
        results.add(f"compiled: {name}", seconds=round(step.compile_seconds, 1), GiB=gib)
        timed(sides.Side(name, step))
        step.release()

    for name, future in others.items():
        run.stage(name, lambda n=name, f=future: measure_variant(n, f), needs=15)
    run.stage(
        "where the time goes",
        lambda: parts.report(c, config, params, batch, device, results, ours and ours.median),
        needs=100,
    )
    for name, options in autotuned.items():
        run.stage(name, lambda n=name, o=options: measure_twin(n, o), needs=150)
    results.add("end", "all stages are done")
    sys.stdout.flush()
    os._exit(0)  # without waiting for threads that still compile


def check_parity(device: Any, results: Any) -> None:
    """Compare our losses and gradients here with the twin's, and with our own on the CPU."""
    import jax

    from benchmarks import parity, setting

    ours = parity.our_losses(setting.toy(), 5, device)
    where = "cpu" if device.platform == "cpu" else "cuda"
    found = {"the twin here": parity.twin_losses(ours, device=where)}
    if where != "cpu":
        on_cpu = parity.our_losses(setting.toy(), 5, jax.devices("cpu")[0])
        found["ours on the CPU"] = on_cpu.losses, on_cpu.gradients
    for name, (losses, gradients) in found.items():
        loss, gradient = parity.largest_differences(ours, losses, gradients)
        verdict = "equal to 1e-4" if max(loss, gradient) < 1e-4 else "NOT EQUAL to 1e-4"
        results.add(
            f"parity with {name}",
            f"losses {loss:.1e}, gradients {gradient:.1e}: {verdict}",
            losses=loss,
            gradients=gradient,
        )


def release_torch() -> None:
    """Give PyTorch's cached memory back to the device."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
