"""Time the jitted matching solvers and scipy in a loop, and their share of a training step.

python -m benchmarks.matching [--smoke]
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

from benchmarks import timing
from stoa_jax import config, ops, plan, program, tasks

SHAPES = ((64, 20, 16), (1024, 20, 16), (64, 4, 8), (1024, 4, 8))


def compare(shape: tuple[int, ...], kind: str, rounds: int) -> dict[str, float]:
    """Return the median seconds of each solver on the same problems; all results must be equal."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=shape).astype(np.float32)
    if kind == "softmax":
        scores = np.asarray(jax.nn.softmax(scores * 3, -1))
    on_device = jnp.asarray(scores)
    solve = {s: jax.jit(lambda x, s=s: ops.assign(x, solver=s)) for s in ("device", "scipy")}

    def loop() -> np.ndarray:
        out = np.full(shape[:2], -1)
        for i, problem in enumerate(scores):
            rows, columns = linear_sum_assignment(problem, maximize=True)
            out[i, rows] = columns
        return out

    sides = {
        "scipy in a loop": loop,
        "device": lambda: np.asarray(solve["device"](on_device)),
        "scipy in a callback": lambda: np.asarray(solve["scipy"](on_device)),
    }
    results = [run() for run in sides.values()]
    assert all(np.array_equal(results[0], other) for other in results[1:])
    return timing.in_turn(sides, rounds)


def step_share(variant: str, clips: int, rounds: int) -> tuple[float, float]:
    """Return the seconds of a training step with all losses here, and of its matchings."""
    c = config.default("pretrain", variant)
    c.train.batch_size = clips
    c.model.scan_layers = False
    task = tasks.make_task(c)
    made = program.make_program(c, task, steps=100)
    rng = np.random.default_rng(0)
    batch = {}
    for name, x in plan.abstract_batch(task, clips).items():
        high = {"pixels": 256, "tokens": 1000, "tags": 3, "classes": 8, "valid": 2}.get(name, 2)
        batch[name] = rng.integers(0, high, x.shape).astype(x.dtype)
        if name in ("boxes", "scores"):
            batch[name] = np.sort(rng.random(x.shape), -1).astype(x.dtype)
    batch["valid"][:] = True
    with jax.set_mesh(made.mesh):
        state = made.init()
        step = made.step.lower(state, batch).compile()
        model = task.model_config()
        words = model.text_length
        shapes = ((clips, model.trajectories, words), (clips, model.action_tokens, words))
        scores = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]
        solve = jax.jit(lambda x: ops.assign(x))

        def run() -> None:
            nonlocal state
            state, values = step(state, batch)
            jax.block_until_ready(values)

        def match() -> None:
            jax.block_until_ready([solve(x) for x in scores])

        seconds = timing.in_turn({"step": run, "matching": match}, rounds)
    return seconds["step"], seconds["matching"]


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Print the tables, and return the seconds of each solver by shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="toy sizes, to see that it runs")
    args = parser.parse_args(argv)
    shapes = ((8, 4, 3),) if args.smoke else SHAPES
    print(timing.environment("jax", "scipy"))
    found = {
        f"{list(shape)} {kind}": compare(shape, kind, 3 if args.smoke else 31)
        for shape in shapes
        for kind in ("normal", "softmax")
    }
    rows = [
        [name, *(f"{1e3 * s:.2f} ({times['scipy in a loop'] / s:.2f}×)" for s in times.values())]
        for name, times in found.items()
    ]
    timing.table(["scores", *next(iter(found.values()))], rows)
    if not args.smoke:
        step, matching = step_share("tiny", 32, 7)
        print(
            f"a step of tiny with 32 clips {1e3 * step:.0f} ms, its two matchings "
            f"{1e3 * matching:.2f} ms: {100 * matching / step:.2f} %"
        )
    return found


if __name__ == "__main__":
    main()
