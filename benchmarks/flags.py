"""Sweep options of XLA's GPU compiler over our training step.

    python -m benchmarks.flags [--dry-run] [--only=REGEX]

Every set of options compiles in its own thread and is then timed in turn with the default, so that
a drift of the GPU's clock does not look like a gain. An option that this XLA does not know is
reported in one line. `--dry-run` runs a single set on a CPU at toy sizes, where it has no effect.
"""

import argparse
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

# Sets of options by name. `compiler_options` applies them to a single compilation.
SETS: dict[str, dict[str, Any]] = {
    "no Triton products": dict(xla_gpu_enable_triton_gemm=False),
    "all products by Triton where possible": dict(xla_gpu_triton_gemm_any=True),
    "exhaustive tiling search": dict(xla_gpu_exhaustive_tiling_search=True),
    "cuDNN fusions of products": dict(xla_gpu_cudnn_gemm_fusion_level=2),
    "no cublasLt": dict(xla_gpu_enable_cublaslt=False),
    "latency-hiding scheduler": dict(xla_gpu_enable_latency_hiding_scheduler=True),
    "no CUDA graphs": dict(xla_gpu_enable_command_buffer=""),
    "cuDNN layer norm": dict(xla_gpu_enable_cudnn_layer_norm=True),
    "no merging of products": dict(xla_gpu_dot_merger_threshold_mb=0),
    "double-buffered loops": dict(xla_gpu_enable_while_loop_double_buffering=True),
    "no excess precision": dict(xla_allow_excess_precision=False),
    "highest autotune level": dict(xla_gpu_autotune_level=5),
    "lower priority of fusions": dict(xla_gpu_enable_priority_fusion=False),
    "cost model by measurements": dict(xla_gpu_enable_analytical_sol_latency_estimator=True),
}


def main(arguments: list[str] | None = None) -> None:
    """Compile all sets, time each in turn with the default, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="run on a CPU, at toy sizes")
    parser.add_argument("--only", default="", help="regex that selects sets by name")
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=525, help="time limit of the whole run")
    parser.add_argument("--out", default="runs/benchmarks/flags.jsonl")
    args = parser.parse_args(arguments)
    if args.dry_run:
        args.clips, args.steps, args.threads = 4, 2, 2
    os.environ["JAX_PLATFORMS"] = "cpu" if args.dry_run else "cuda"
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    from benchmarks import setting, sides
    from benchmarks.gpu import Run
    from benchmarks.results import Results

    command = " ".join(["python -m benchmarks.flags", *(arguments or sys.argv[1:])])
    results = Results(args.out, command)
    run = Run(args, results)
    c = setting.model_config("toy" if args.dry_run else "base", dtype="bfloat16")
    config, batch = setting.step_config(args.clips), setting.random_batch(c, args.clips)
    chosen = {name: options for name, options in SETS.items() if re.search(args.only, name)}
    if args.dry_run:
        chosen = dict(list(chosen.items())[:1])
    device = jax.devices()[0]
    program, _ = setting.our_program(c, config, device)
    params = setting.random_parameters(program, std=0.02)
    pool = ThreadPoolExecutor(args.threads)

    def compiling(options: dict[str, Any]):
        options = {**options, **(setting.QUICK if args.dry_run else {})}
        return pool.submit(sides.OurStep(c, config, device, lambda: params, batch).compile, options)

    default = compiling({})
    others = {name: compiling(options) for name, options in chosen.items()}
    began = time.monotonic()
    for future in (default, *others.values()):
        future.exception(timeout=max(run.left - 60, 1))  # timings need an idle machine
    results.add("compiled", sets=len(others), seconds=round(time.monotonic() - began, 1))
    base = sides.Side("default", default.result())
    base.step()

    def measure(name: str, future: Any) -> None:
        side = sides.Side(name, future.result())
        loss = side.step()
        base.seconds.clear()
        for _ in sides.in_turn([base, side], 2, args.steps):
            pass
        ratio = base.median / side.median
        results.add(
            name,
            f"{args.clips / side.median:.2f} clips/s, {ratio:.3f} times the default's "
            f"{args.clips / base.median:.2f}: {chosen[name]}",
            clips_per_second=args.clips / side.median,
            ratio=ratio,
            loss=loss,
            options=chosen[name],
        )
        side.step.release()

    for name, future in others.items():
        run.stage(name, lambda n=name, f=future: measure(n, f), needs=15)
    results.add("end", "all sets are done")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
