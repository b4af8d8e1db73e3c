"""Time the evaluation of questions: each clip encoded once, and once for every question.

    python -m benchmarks.questions [--clips=200] [--rounds=3] [--smoke]

The shipped model answers the questions about live test clips (five a clip), with the evaluator of
`stoa_jax.tasks.qa`. The other side encodes the clip of every question again. Compilation is not
timed.
"""

import argparse
from collections.abc import Mapping

import jax
import numpy as np
from jax import Array

import stoa_jax
from benchmarks import timing
from stoa_jax import config, sharding
from stoa_jax.data import pipeline
from stoa_jax.models.stoa import Stoa
from stoa_jax.tasks import make_task
from stoa_jax.tasks.base import encode_video, stacked
from stoa_jax.tasks.qa import QuestionEvaluator, best_answers


def evaluator_of(model: stoa_jax.Model, clips: int, batch_size: int) -> QuestionEvaluator:
    """Return the evaluator of questions about live test clips."""
    c = config.live("qa", "small")
    c.data.sets = (("synthetic/qa", 1.0),)
    c.data.world.test = clips
    c.model.num_answers = model.config.num_answers
    c.eval.batch_size = batch_size
    task = make_task(c)
    task.answers = model.answers
    evaluator = task.evaluators()["qa"]
    assert isinstance(evaluator, QuestionEvaluator)
    return evaluator


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Check that both sides answer alike, print the table, and return the seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="few clips, to see that it runs")
    args = parser.parse_args(argv)
    clips, size = (4, 8) if args.smoke else (args.clips, 100)
    loaded = stoa_jax.load("synthetic")
    evaluator, model = evaluator_of(loaded, clips, size), loaded.whole
    assert model is not None
    mesh = sharding.make_mesh(evaluator.config, jax.devices()[:1])

    @jax.jit
    def directly(model: Stoa, batch: Mapping[str, Array]) -> tuple[Array, Array]:
        return best_answers(model, batch, encode_video(model, batch))

    def once() -> np.ndarray:
        video = evaluator.encode(model, mesh)
        return evaluator.run(best_answers, model, mesh, video)[0]

    def for_every_question() -> np.ndarray:
        spec = evaluator.task.batch_spec(train=False)
        loader = pipeline.Loader(evaluator.split, spec, size, train=False)
        batches = (sharding.to_devices(rows, mesh, size) for rows in loader)
        return stacked((directly(model, batch) for batch in batches), loader.num_examples)[0]

    sides = {"each clip once": once, "once for every question": for_every_question}
    with jax.set_mesh(mesh):
        a, b = (run() for run in sides.values())
        np.testing.assert_allclose(a, b, atol=1e-4, err_msg="the sides answer differently")
        seconds = timing.in_turn(sides, 1 if args.smoke else args.rounds)
    print(timing.environment("jax"))
    timing.table(
        [f"{len(a)} questions about {clips} clips, encoding", "s", "ratio"],
        [[name, f"{s:.2f}", f"{s / seconds['each clip once']:.2f}"] for name, s in seconds.items()],
    )
    return seconds


if __name__ == "__main__":
    main()
