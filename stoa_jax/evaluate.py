"""Evaluate a checkpoint: every metric, with the context needed to compare it.

    python -m stoa_jax.main --mode=eval --config=configs/retrieval.py:msrvtt --workdir=runs/r

Evaluates the work directory's newest checkpoint or, if it has none, the weights that `init.path`
names (zero-shot). Writes `results.json`, a list with one entry per metric, and `predictions.json`.
"""

import datetime
import importlib.metadata
import json
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

import stoa_jax
from stoa_jax import checkpoint, sharding
from stoa_jax.errors import UserError
from stoa_jax.files import write_json
from stoa_jax.inference import sidecars
from stoa_jax.models.parameters import check_same, named_parameters, with_parameters
from stoa_jax.models.stoa import Stoa
from stoa_jax.tasks import make_task
from stoa_jax.tasks.base import SplitEvaluator, TaskBase

RESULTS, PREDICTIONS = "results.json", "predictions.json"


def run(
    c: ConfigDict,
    workdir: str | Path,
    model: Stoa | None = None,
    *,
    task: TaskBase | None = None,
    source: str = "",
    verbose: bool = True,
) -> list[dict[str, Any]]:
    """Evaluate a model, and write `results.json` and `predictions.json` into the work directory.

    A given `model` is sharded over the configuration's mesh and `source` names its origin.
    Otherwise the model is loaded from the work directory or from `init.path`.
    """
    workdir = Path(workdir).absolute()
    task = make_task(c) if task is None else task
    mesh = sharding.make_mesh(c)
    sharding.check_batch(c, mesh)
    evaluators = task.evaluators()
    for evaluator in evaluators.values():
        refuse_partial(evaluator)
    if model is None:
        model, source, untrained = load(c, workdir, task, mesh)
        for evaluator in evaluators.values():
            evaluator.leave_out(untrained, source)
    calibration = calibration_of(c, workdir)
    for evaluator in evaluators.values():
        evaluator.calibration = calibration
    if jax.process_index() == 0:
        make_directory(workdir)

    results, predictions = [], {}
    with jax.set_mesh(mesh):
        for name, evaluator in evaluators.items():
            for row in rows_of(evaluator, model, mesh):
                results.append(row)
                if verbose and jax.process_index() == 0:
                    print(line_of(row), flush=True)
            predictions |= evaluator.predictions
            logging.info("evaluated %s", name)
    about = provenance(c, source)
    results = [{**row, **about} for row in results]
    if jax.process_index() == 0:
        write_json(workdir / RESULTS, results)
        if predictions:
            write_json(workdir / PREDICTIONS, predictions)
    return results


def rows_of(evaluator: SplitEvaluator, model: Stoa, mesh: Mesh) -> Iterator[dict[str, Any]]:
    """Yield the metrics of an evaluator as JSON objects."""
    split = evaluator.split
    for row in evaluator.rows(model, mesh):
        value = row.value
        if isinstance(value, float) and not np.isfinite(value):
            value = str(value)  # JSON has no NaN
        yield {
            "metric": row.metric,
            "value": value,
            "n": row.n,
            "split": evaluator.split_name,
            "split_hash": split.fingerprint,
            "split_size": evaluator.full,
            "partial": evaluator.partial,
            "protocol": row.protocol,
        }


def line_of(row: Mapping[str, Any]) -> str:
    """Format a metric for printing."""
    value = row["value"]
    value = f"{value:10.4f}" if isinstance(value, int | float) else f"{value:>10}"
    mark = " (partial)" if row["partial"] else ""
    return f"{row['metric']:45} {value}  n={row['n']}{mark}"


def refuse_partial(evaluator: SplitEvaluator) -> None:
    """Raise UserError if a published split was built in part, unless a partial one is allowed."""
    if evaluator.missing and not evaluator.config.eval.allow_partial and not evaluator.limit:
        size = len(evaluator.split)
        raise UserError(
            f"{evaluator.split_name}: {evaluator.missing} of {size + evaluator.missing} published "
            "clips are not in the built set, so its metrics could not be compared; see its "
            "failures.jsonl and build again, or pass --config.eval.allow_partial=true for metrics "
            "marked partial"
        )


def load(c: ConfigDict, workdir: Path, task: TaskBase, mesh: Mesh) -> tuple[Stoa, str, list[str]]:
    """Load the work directory's newest checkpoint, or else the weights that `init.path` names.

    Returns the model, its source, and the parameters that the weights lack.
    """
    config = task.model_config()
    abstract = jax.eval_shape(lambda: Stoa(config, rngs=nnx.Rngs(0)))
    shapes = named_parameters(abstract)
    specs = sharding.param_specs(shapes, mesh)
    if has_checkpoint(workdir):
        values, _, meta = checkpoint.load_params(workdir)
        step = max(int(p.name) for p in (workdir / checkpoint.FOLDER).iterdir() if p.name.isdigit())
        source = f"{workdir}/{checkpoint.FOLDER}/{step}"
        check_answers(task, meta.get("extras", {}), source)
        check_same(
            {name: value.shape for name, value in values.items()},
            {name: shape.shape for name, shape in shapes.items()},
            source,
            "evaluate with the configuration it was trained with",
        )
        fresh: list[str] = []
    elif c.init.path:
        from stoa_jax.weights import whole_parameters

        source = str(c.init.path)
        values, report = whole_parameters(c.init.path, config, seed=c.seed)
        fresh = sorted(report.new)
    else:
        raise UserError(
            f"--workdir: {workdir} holds no checkpoint, and config.init.path is empty; name a "
            "run's directory, or weights with --config.init.path=…"
        )
    if fresh:
        groups = sorted({"/".join(name.split("/")[:2]) for name in fresh})
        logging.warning(
            "%s holds no %s: these parameters are initialised at random",
            source,
            ", ".join(groups),
        )
        source += f" (random: {', '.join(groups)})"
    placed = {
        name: jax.make_array_from_callback(
            shape.shape,
            NamedSharding(mesh, specs[name]),
            np.asarray(values[name], shape.dtype).__getitem__,
        )
        for name, shape in shapes.items()
    }
    return with_parameters(abstract, placed), source, fresh


def has_checkpoint(workdir: Path) -> bool:
    """Return whether a work directory holds a checkpoint."""
    return any(path.name.isdigit() for path in (workdir / checkpoint.FOLDER).glob("*"))


def calibration_of(c: ConfigDict, workdir: Path) -> sidecars.Calibration:
    """Return the work directory's calibration, or else that of the weights at `init.path`."""
    found = sidecars.read_calibration(workdir)
    if found is None and c.init.path and not has_checkpoint(workdir):
        found = sidecars.read_calibration(Path(c.init.path))
    return found or sidecars.Calibration()


def check_answers(task: TaskBase, extras: Mapping[str, Any], source: str) -> None:
    """Use the trained answer classes; raise UserError if the data has other answers."""
    trained = extras.get("answers")
    if trained is None or not task.answers or list(trained) == list(task.answers):
        return
    if set(task.answers) <= set(
        trained
    ):  # with fewer examples, the answers are ordered differently
        task.answers = tuple(trained)
        return
    raise UserError(
        f"{source}: was trained on {len(trained)} answers that differ from those of "
        f"{task.config.data.sets[0][0]}; evaluate with the training set it was trained on"
    )


def provenance(c: ConfigDict, source: str) -> dict[str, Any]:
    """Describe the origin of the results: checkpoint, configuration, versions, devices."""
    return {
        "checkpoint": source,
        "config": json.loads(json.dumps(c.to_dict())),
        "seed": c.seed,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
    }


def versions() -> dict[str, str]:
    """Return the package versions recorded with the results."""
    found = {"stoa_jax": stoa_jax.__version__, "python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", "numpy", "pycocoevalcap"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def make_directory(path: Path) -> None:
    """Create the directory, or raise UserError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--workdir: {path} cannot be written ({error.strerror}); name another directory"
        ) from error
