"""A task's evaluators on any checkpoint: every figure with what it takes to compare it.

    python -m stoa_jax.main --mode=eval --config=configs/retrieval.py:msrvtt --workdir=runs/r

The work directory's newest checkpoint; without one, the weights that `init.path` names (zero-shot).
Writes `results.json`, a list with one entry a figure, and `predictions.json`.
"""

import datetime
import importlib.metadata
import json
import os
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
from stoa_jax.models.parameters import named_parameters, with_parameters
from stoa_jax.models.stoa import Stoa
from stoa_jax.tasks import Task, make_task
from stoa_jax.tasks.base import SplitEvaluator

RESULTS, PREDICTIONS = "results.json", "predictions.json"


def run(
    c: ConfigDict,
    workdir: str | Path,
    model: Stoa | None = None,
    *,
    task: Task | None = None,
    source: str = "",
    verbose: bool = True,
) -> list[dict[str, Any]]:
    """Evaluates, writes `results.json` and `predictions.json` into the work directory.

    `model` comes sharded over the configuration's mesh, `source` says from where; without one it
    is read from the work directory or from `init.path`.
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
    if jax.process_index() == 0:
        make_directory(workdir)

    results, predictions = [], {}
    with jax.set_mesh(mesh):
        for name, evaluator in evaluators.items():
            for row in rows_of(evaluator, model, mesh):
                results.append(row)
                if verbose and jax.process_index() == 0:
                    print(line_of(row), flush=True)
            predictions |= getattr(evaluator, "predictions", {})
            logging.info("evaluated %s", name)
    about = provenance(c, source)
    results = [{**row, **about} for row in results]
    if jax.process_index() == 0:
        write_json(workdir / RESULTS, results)
        if predictions:
            write_json(workdir / PREDICTIONS, predictions)
    return results


def rows_of(evaluator: SplitEvaluator, model: Stoa, mesh: Mesh) -> Iterator[dict[str, Any]]:
    """The figures of an evaluator as JSON objects."""
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
    """A figure as printed."""
    value = row["value"]
    value = f"{value:10.4f}" if isinstance(value, int | float) else f"{value:>10}"
    mark = " (partial)" if row["partial"] else ""
    return f"{row['metric']:45} {value}  n={row['n']}{mark}"


def refuse_partial(evaluator: SplitEvaluator) -> None:
    """A figure on a part of a published split is not that split's figure."""
    if evaluator.missing and not evaluator.config.eval.allow_partial and not evaluator.limit:
        size = len(evaluator.split)
        raise UserError(
            f"{evaluator.split_name}: {evaluator.missing} of {size + evaluator.missing} published "
            "clips are not in the built set, so its figures could not be compared; see its "
            "failures.jsonl and build again, or pass --config.eval.allow_partial=true for figures "
            "marked partial"
        )


def load(c: ConfigDict, workdir: Path, task: Task, mesh: Mesh) -> tuple[Stoa, str, list[str]]:
    """The model, from where, and which of its parameters nobody trained.

    Of the work directory's newest checkpoint, else with the weights that `init.path` names.
    """
    config = task.model_config()
    abstract = jax.eval_shape(lambda: Stoa(config, rngs=nnx.Rngs(0)))
    shapes = named_parameters(abstract)
    specs = sharding.param_specs(shapes, mesh)
    if (workdir / checkpoint.FOLDER).is_dir() and any(
        path.name.isdigit() for path in (workdir / checkpoint.FOLDER).iterdir()
    ):
        values, _, meta = checkpoint.load_params(workdir)
        step = max(int(p.name) for p in (workdir / checkpoint.FOLDER).iterdir() if p.name.isdigit())
        source = f"{workdir}/{checkpoint.FOLDER}/{step}"
        check_answers(task, meta.get("extras", {}), source)
        check_names(shapes, values, source)
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
            "%s holds no %s: what they take part in stands as initialised at random",
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


def check_names(shapes: Mapping[str, Any], values: Mapping[str, Any], source: str) -> None:
    """Weights must be those of this model."""
    missing, extra = sorted(set(shapes) - set(values)), sorted(set(values) - set(shapes))
    if missing or extra:
        raise UserError(
            f"{source}: the model differs from the configuration's; "
            f"missing {', '.join(missing[:3]) or 'none'}, "
            f"not the model's {', '.join(extra[:3]) or 'none'}; "
            "evaluate with the configuration it was trained with"
        )
    for name, shape in shapes.items():
        if tuple(shape.shape) != tuple(values[name].shape):
            raise UserError(
                f"{source}: {name} is {tuple(values[name].shape)}, the model has "
                f"{tuple(shape.shape)}; evaluate with the configuration it was trained with"
            )


def check_answers(task: Task, extras: Mapping[str, Any], source: str) -> None:
    """The classes of a trained answer head must be those of the data at hand."""
    trained = extras.get("answers")
    if trained is None or list(trained) == list(getattr(task, "answers", trained)):
        return
    raise UserError(
        f"{source}: it was trained on {len(trained)} answers that differ from those of "
        f"{task.config.data.sets[0][0]}; evaluate with the training set it was trained on"
    )


def provenance(c: ConfigDict, source: str) -> dict[str, Any]:
    """What else a figure must say of itself."""
    return {
        "checkpoint": source,
        "config": json.loads(json.dumps(c.to_dict())),
        "seed": c.seed,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
    }


def versions() -> dict[str, str]:
    """Of what the figures hang on."""
    found = {"stoa_jax": stoa_jax.__version__, "python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", "numpy", "pycocoevalcap"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def make_directory(path: Path) -> None:
    """Exists and can be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--workdir: {path} cannot be written ({error.strerror}); name another directory"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)
