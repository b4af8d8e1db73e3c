"""Time the matching solvers under jit, in milliseconds.

python benchmarks/matching.py
"""

import time
from collections.abc import Callable

import jax
import numpy as np

from stoa_jax import ops

SHAPES = ((64, 20, 16), (1024, 20, 16), (64, 4, 8), (1024, 4, 8))
SOLVERS = ("scipy", "device", "auction")


def median_ms(f: Callable, scores: jax.Array, seconds: float = 2.0) -> float:
    """Return the median time of calls over about `seconds`, after one call that compiles."""
    f(scores).block_until_ready()
    times = []
    while sum(times) < seconds:
        start = time.perf_counter()
        f(scores).block_until_ready()
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times))


def main() -> None:
    """Print a Markdown table."""
    rng = np.random.default_rng(0)
    print("| scores | " + " | ".join(SOLVERS) + " |\n|" + "---|" * (1 + len(SOLVERS)))
    for shape in SHAPES:
        for name in ("normal", "softmax"):
            scores = jax.numpy.asarray(rng.normal(size=shape), "float32")
            if name == "softmax":
                scores = jax.nn.softmax(scores * 3, -1)
            times = {
                s: median_ms(jax.jit(lambda x, s=s: ops.assign(x, solver=s)), scores)
                for s in SOLVERS
            }
            cells = (f"{t:.2f} ({t / times['scipy']:.2f}×)" for t in times.values())
            print(f"| {list(shape)} {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
