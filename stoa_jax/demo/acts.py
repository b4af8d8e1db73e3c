"""The demonstration in two acts: the shipped model, then a small one trained from scratch.

Each act prints the command that does the same by hand.
"""

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from stoa_jax import config
from stoa_jax.demo import page, tables
from stoa_jax.demo.commands import say, shipped_config
from stoa_jax.errors import UserError

TEST_CLIPS, TRAIN_CLIPS = 200, 4000
LISTED = 0.25  # share of the training clips among whose texts act one counts the most frequent
SHOWN = 8  # clips on the page
SEED = 2026  # seed of the test clips, which no training of the shipped model has seen
STEPS = 300  # of act two
CURVE = "curve.json"  # beside the shipped weights: their accuracy by training step


def run(workdir: Path, steps: float = 1.0, clips: float = 1.0) -> None:
    """Run both acts; write the page after each."""
    began = time.monotonic()
    workdir.mkdir(parents=True, exist_ok=True)
    first = act_one(workdir / "shipped", clips)
    write_page(workdir, first, None)
    print(tables.markdown(first["results"]))
    say_where(workdir, began)
    second = act_two(workdir / "tiny", workdir / "tiny-qa", steps, clips)
    write_page(workdir, first, second)
    print(summary(first, second))
    say_where(workdir, began)


def act_one(workdir: Path, clips: float) -> dict[str, Any]:
    """Evaluate the shipped model on fresh test clips; return its results and predictions."""
    from stoa_jax import evaluate
    from stoa_jax.inference import sidecars
    from stoa_jax.inference.loading import locate
    from stoa_jax.tasks.joint import Joint

    weights = locate("synthetic")
    c = live_config(clips)
    c.data.world.train = max(100, round(LISTED * c.data.world.train))
    c.model.update(shipped_model(weights))
    c.init.path = str(weights)
    c.eval.variants = ("single_frame", "text_only")
    c.eval.rerank = 5
    say(
        "python -m stoa_jax.main --mode=eval --config=configs/joint.py "
        f"--config.init.path={weights} --workdir={workdir}"
    )
    task = Joint(c)
    untrained = (sidecars.read(weights, sidecars.SETTINGS) or {}).get("untrained", ())
    for evaluator in task.evaluators().values():
        evaluator.leave_out(untrained, str(weights))
    answers = sidecars.read_answers(weights)
    if answers:
        task.answers = answers  # the classes of the shipped head, in its order
    results = read_results(workdir)
    if results is None:
        began = time.monotonic()
        results = evaluate.run(c, workdir, task=task, verbose=False)
        print(f"evaluated in {time.monotonic() - began:.0f} s", flush=True)
    split = task.open_split(c.data.sets[0][0], "test")
    predictions = json.loads((workdir / "predictions.json").read_text())
    cards = page.cards("synthetic", split, predictions, SHOWN)
    return {"results": results, "cards": cards, "curve": read_curve(weights / CURVE)}


def act_two(workdir: Path, evaluated: Path, steps: float, clips: float) -> dict[str, Any]:
    """Train `tiny` from scratch with all six losses and questions; evaluate it on test clips."""
    from stoa_jax import evaluate, train
    from stoa_jax.tasks import make_task

    c = tiny_config(clips)
    c.train.steps = max(2, round(STEPS * steps))
    say(
        "python -m stoa_jax.main --config=configs/joint.py …  # the model `tiny`, "
        f"{c.train.steps} steps of {c.train.batch_size} clips, --workdir={workdir}"
    )
    if train.train(c, workdir, task=make_task(c))["stopped"]:
        raise UserError("stopped; run the same command again to continue")
    results = read_results(evaluated)
    if results is None:
        c.task = "qa"
        c.data.sets = ((c.data.questions, 1.0),)
        c.init.path = str(workdir)
        results = evaluate.run(c, evaluated, task=make_task(c), verbose=False)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {
        "results": results,
        "curve": accuracy_curve(rows),
        "seconds": c.train.steps
        * statistics.fmean(r["time/step"] for r in rows if "time/step" in r),
        "steps": c.train.steps,
        "batch_size": c.train.batch_size,
    }


def live_config(clips: float) -> ConfigDict:
    """Return the configuration of all heads on live clips, with fresh test clips."""
    c = shipped_config("joint", "heads")
    c.data.world.seed = SEED
    c.data.world.test = max(20, round(TEST_CLIPS * clips))
    c.data.world.train = max(100, round(TRAIN_CLIPS * clips))
    return c


def tiny_config(clips: float) -> ConfigDict:
    """Return act two's configuration: `tiny` from scratch, with the six losses of the paper."""
    c = live_config(clips)
    answers = c.model.num_answers
    c.model.update(config.model_section("tiny"))
    c.model.num_answers = answers
    c.model.scan_layers = False
    c.data.world.size = c.model.image_size
    config.set_losses(c, vtc=1.0, vtm=1.0, mlm=0.3, plm=1.0, ota=0.5, asp=0.5)
    c.loss.answer, c.loss.choice = 1.0, 0.0
    c.init.path = c.init.reinit = ""
    c.train.keep_vision = False
    c.optim.groups = ((r".*", 1e-3),)
    c.checkpoint.every_steps = 150
    c.log.every_steps = 10
    return c


def shipped_model(weights: Path) -> dict[str, Any]:
    """Return the fields of the shipped model's configuration."""
    import dataclasses

    from stoa_jax.weights import config_of

    return dataclasses.asdict(config_of(weights)[0])


def read_results(workdir: Path) -> list[dict[str, Any]] | None:
    """Return the results of an earlier evaluation, or None if there are none."""
    path = workdir / "results.json"
    return json.loads(path.read_text()) if path.is_file() else None


def read_curve(path: Path) -> page.Curve | None:
    """Return the training curve beside the shipped weights, or None if there is none."""
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    return page.Curve(found["steps"], found["values"])


def accuracy_curve(rows: Sequence[dict[str, Any]]) -> page.Curve:
    """Return the accuracy on training questions by step, from the rows of `metrics.jsonl`."""
    rows = [row for row in rows if "accuracy" in row]
    return page.Curve([row["step"] for row in rows], [100 * row["accuracy"] for row in rows])


def value_of(results: Sequence[dict[str, Any]], metric: str) -> float:
    """Return a metric's value among an evaluation's results."""
    return next(float(row["value"]) for row in results if row["metric"] == metric)


def summary(first: dict[str, Any], second: dict[str, Any]) -> str:
    """Return a line that says honestly how far the short training got."""
    tiny, shipped = (value_of(x["results"], "qa/accuracy") for x in (second, first))
    majority = value_of(second["results"], "qa/majority/accuracy")
    seen = second["steps"] * second["batch_size"]
    return (
        f"{second['seconds'] / 60:.1f} minutes of training steps, {seen:,} clips, bring the tiny "
        f"model to {tiny:.1f} % of test questions. Always giving the most frequent answer is right "
        f"for {majority:.1f} %; the shipped model is for {shipped:.1f} %."
    )


def write_page(workdir: Path, first: dict[str, Any], second: dict[str, Any] | None) -> None:
    """Write `index.html` and `results.md` into the work directory."""
    from stoa_jax.files import write_text

    if second is None:
        training = "<p>Act two is training. Reload this page in a few minutes.</p>"
    else:
        curves = {"tiny, from scratch": second["curve"]}
        if first["curve"] is not None:
            curves = {"the shipped model": first["curve"], **curves}
        training = page.training(summary(first, second), curves)
    write_text(workdir / "index.html", page.document(first["results"], first["cards"], training))
    write_text(workdir / "results.md", tables.markdown(first["results"]) + "\n")


def say_where(workdir: Path, began: float) -> None:
    """Print where the page is, and the time so far."""
    minutes = (time.monotonic() - began) / 60
    print(f"{minutes:.1f} minutes; open {workdir / 'index.html'}", flush=True)
