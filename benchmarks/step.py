"""Time the training step in turn with the same network and losses in PyTorch, in one run.

    python -m benchmarks.step --device=cpu --size=base --clips=2 --sides=ours,twin,authors
    python -m benchmarks.step --device=gpu --dtype=bfloat16 --clips=32 --sides=ours,compiled

Sides: `ours`, the step as training runs it; `twin`, the twin in PyTorch's eager mode; `compiled`,
the twin under torch.compile; `max-autotune`, the same with kernels chosen by measurement;
`authors`, the twin with every trajectory in its own sequence, one fusion pass for each word that
PLM predicts, and all layers at all positions. `--parts` adds the time of each part of our step, and
`--kernels` the slowest operations. Every result is printed and stored at once.
"""

import argparse
import math
import os
import sys
import time

COMPILE = {"compiled": "default", "max-autotune": "max-autotune-no-cudagraphs"}
SIDES = ("ours", "twin", "compiled", "max-autotune", "authors")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--size", default="base", help="toy, or a variant of ModelConfig")
    parser.add_argument("--set", default="", help="other fields, such as vision_depth=4,frames=2")
    parser.add_argument("--clips", type=int, default=2, help="the batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="steps of each side per round")
    parser.add_argument("--sides", default="ours,twin", help=", ".join(SIDES))
    parser.add_argument("--stream", default="", help="dtype of the twin's activations")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no round after that")
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--out", default="runs/benchmarks/step.jsonl")
    args = parser.parse_args(arguments)
    unknown = set(args.sides.split(",")) - set(SIDES)
    if unknown:
        parser.error(f"--sides: no {', '.join(sorted(unknown))}; choose from {', '.join(SIDES)}")
    return args


def main(arguments: list[str] | None = None) -> None:
    """Time the sides in turn and print the ratios."""
    args = parse(arguments)
    deadline = time.monotonic() + args.seconds
    # JAX would take most of the memory for itself, and the twin runs in the same process.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ["JAX_PLATFORMS"] = "cpu" if args.device == "cpu" else "cuda,cpu"
    import jax

    from benchmarks import parts, setting, sides
    from benchmarks.results import Results
    from stoa_jax.chips import chip_of

    pairs = (pair.split("=") for pair in args.set.split(",") if pair)
    changes = {name: int(value) for name, value in pairs}
    c = setting.model_config(args.size, dtype=args.dtype, **changes)
    config, batch = setting.step_config(args.clips), setting.random_batch(c, args.clips)
    device = jax.devices()[0]
    command = " ".join(["python -m benchmarks.step", *(arguments or sys.argv[1:])])
    results = Results(args.out, command)
    performed, nominal = sides.work_of_a_clip(c, config, batch, args.clips, results)

    program, _ = setting.our_program(c, config, device)

    def params():  # created for each side; keeping them would take memory from the steps
        return setting.random_parameters(program, std=0.02)

    timed = []
    for name in args.sides.split(","):
        began = time.monotonic()
        if name == "ours":
            step = sides.OurStep(c, config, device, params, batch).compile()
            results.add("memory of ours", temporaries_GiB=round(step.temporaries() / 2**30, 2))
            side = sides.Side(name, step)
        else:
            options = dict(compile=COMPILE.get(name, ""), authors=name == "authors")
            options |= dict(device="cpu" if args.device == "cpu" else "cuda", stream=args.stream)
            side = sides.twin_side(name, c, config, params(), batch, **options)
        loss = side.step()
        seconds = round(time.monotonic() - began, 1)
        results.add(f"first step of {name}", loss=round(loss, 4), seconds=seconds)
        timed.append(side)
    for _ in sides.in_turn(timed, args.rounds, args.steps, deadline):
        steps = {side.name: round(side.seconds[-1], 4) for side in timed}
        results.add("round", **steps)

    chip = chip_of(device.device_kind)
    for side in timed:
        speed = args.clips / side.median
        rates = {"performed": speed * performed, "nominal": speed * nominal}
        shares = {k: v / chip.flops for k, v in rates.items()} if chip else {}
        share = "".join(f", {v:.1%} of peak ({k})" for k, v in shares.items())
        ratio = side.median / timed[0].median
        results.add(
            side.name,
            f"{speed:.3f} clips/s, {side.median * 1e3:.1f} ms a step (median of "
            f"{len(side.seconds)}), {ratio:.2f} times the time of {timed[0].name}{share}",
            clips_per_second=speed,
            median_s=side.median,
            steps=len(side.seconds),
            time_over_first=ratio,
            **{f"share_{k}": v for k, v in shares.items()},
        )
    if args.parts:
        whole = next((side.median for side in timed if side.name == "ours"), None)
        parts.report(c, config, params(), batch, device, results, whole)
    if args.kernels:
        ours = next(side for side in timed if side.name == "ours")
        parts.report_kernels(ours.step, results)


if __name__ == "__main__":
    main()
