"""Load weights from CLIP files, the authors' checkpoint, and our own files and work directories.

Loading is strict: every tensor of a file is either used or reported as unused with a reason, and
every parameter of the model is either filled or reported as new.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from stoa_jax import migrations
from stoa_jax.errors import UserError
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.parameters import check_same, named_parameters
from stoa_jax.models.stoa import Stoa
from stoa_jax.weights import clip, released
from stoa_jax.weights.files import open_tensors
from stoa_jax.weights.tables import Report, Shape
from stoa_jax.weights.tensors import TensorFile

__all__ = ["Report", "initial_parameters", "open_weights", "parameter_shapes", "whole_parameters"]

KINDS = {
    "hugging_face": "CLIP in Hugging Face's names",
    "openai": "OpenAI's CLIP",
    "open_clip": "CLIP in open_clip's names",
    "released": "the authors' STOA-VLP checkpoint",
    "stoa_jax": "our safetensors",
    "workdir": "one of our work directories",
}
METADATA = "stoa_jax"  # key in our safetensors' metadata under which the configuration is stored
UNTRAINED = "stoa_jax_untrained"  # key of a JSON list of untrained heads


def is_workdir(path: str | Path) -> bool:
    """Return whether `path` is the work directory of a run."""
    return (Path(path) / "checkpoints").is_dir()


def open_weights(path: str | Path) -> tuple[TensorFile, str]:
    """Open a file without reading its tensors; return them and their kind, one of `KINDS`."""
    tensors = open_tensors(path)
    if METADATA in tensors.metadata:
        return tensors.renamed(migrations.migrate_parameter_name), "stoa_jax"
    if any(name.startswith("module.") for name in tensors):  # saved by PyTorch's DataParallel
        tensors = tensors.renamed(lambda name: name.removeprefix("module."))
    kind = "released" if released.is_released(tensors) else clip.kind_of(tensors)
    if kind is None:
        first = ", ".join(list(tensors)[:4])
        raise UserError(
            f"{path}: unknown kind of weights; the first tensors are {first}. Known kinds: "
            f"{'; '.join(KINDS.values())}"
        )
    return tensors, kind


def config_of(path: str | Path, *, activation: str | None = None) -> tuple[ModelConfig, str]:
    """Return the configuration of the model whose weights are at `path`, and their kind."""
    if is_workdir(path):
        from stoa_jax.checkpoint import load_params

        return _our_config(load_params(path)[1], str(path)), "workdir"
    tensors, kind = open_weights(path)
    return _config(tensors, kind, activation), kind


def _config(tensors: TensorFile, kind: str, activation: str | None = None) -> ModelConfig:
    if kind == "stoa_jax":
        try:
            fields = migrations.migrate_model_fields(json.loads(tensors.metadata[METADATA]))
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{tensors.path}: its metadata is not a model configuration of ours: {error}"
            ) from error
        return _our_config(fields, str(tensors.path))
    if kind == "released":
        return released.config_of(tensors)
    return clip.config_of(tensors, kind, activation)


def _our_config(fields: Mapping[str, Any], where: str) -> ModelConfig:
    """Return the configuration of fields that some version of this package saved."""
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    if unknown := sorted(set(fields) - known):
        raise UserError(
            f"{where}: its model has the field {unknown[0]!r}, which this version of stoa_jax does "
            "not know: another version saved it; install that version, or a newer one"
        )
    try:
        return ModelConfig(**fields)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{where}: its fields are not a model configuration of ours: {error}"
        ) from error


def parameter_shapes(c: ModelConfig) -> dict[str, Shape]:
    """Return the shape of every parameter of a model, by name."""
    abstract = jax.eval_shape(lambda: Stoa(c, rngs=nnx.Rngs(0)))
    return {name: tuple(x.shape) for name, x in named_parameters(abstract).items()}


def initial_parameters(
    path: str | Path, model_config: ModelConfig, *, seed: int = 0, reinit: str = ""
) -> tuple[dict[str, np.ndarray], Report]:
    """Load those parameters of a model that the weights at `path` provide, as float32.

    Also returns a report on every tensor. `report.new` lists the parameters that the file does not
    provide, directly or by copying. `seed` initialises the rows of a position table beyond those
    that the file has. Parameters that match the regex `reinit` are new, whether the file has them,
    has them in another shape, or lacks them.
    """
    shapes = parameter_shapes(model_config)
    fresh = re.compile(reinit or r"(?!)")
    if is_workdir(path):
        params, report = _from_workdir(path, shapes, fresh)
        report.new = {name: shape for name, shape in shapes.items() if name not in params}
        return params, report
    tensors, kind = open_weights(path)
    report = Report(str(path), KINDS[kind])
    if kind == "stoa_jax":
        params = _from_safetensors(tensors, shapes, report, fresh)
    elif kind == "released":
        params = released.read_released(tensors, model_config, shapes, report)
    else:
        params = clip.read_clip(tensors, kind, model_config, shapes, report)
        clip.initial_from_clip(params, model_config, shapes, report)
        params["fusion/positions"] = clip.fusion_positions(
            params["text/positions"], shapes["fusion/positions"], seed, report
        )
    params = {name: x for name, x in params.items() if not fresh.search(name)}
    report.copied = {n: of for n, of in report.copied.items() if not fresh.search(n)}
    report.new = {name: shape for name, shape in shapes.items() if name not in params}
    return dict(sorted(params.items())), report


def whole_parameters(
    path: str | Path, model_config: ModelConfig, *, seed: int = 0
) -> tuple[dict[str, np.ndarray], Report]:
    """Load all parameters of a model: `initial_parameters`, with the rest freshly initialised."""
    params, report = initial_parameters(path, model_config, seed=seed)
    params |= _initialise(model_config, tuple(report.new), seed)
    return dict(sorted(params.items())), report


def _initialise(c: ModelConfig, names: tuple[str, ...], seed: int) -> dict[str, np.ndarray]:
    # Under jit, parameters that are not returned are never allocated, so that a large model does
    # not have to fit into memory twice.
    @jax.jit
    def initialise(key: jax.Array) -> dict[str, jax.Array]:
        params = named_parameters(Stoa(c, rngs=nnx.Rngs(params=key)))
        return {name: params[name] for name in names}

    return jax.device_get(initialise(jax.random.key(seed))) if names else {}


def _from_workdir(
    path: str | Path, shapes: dict[str, Shape], fresh: re.Pattern[str]
) -> tuple[dict, Report]:
    from stoa_jax.checkpoint import load_params

    params, _, meta = load_params(path)
    params = migrations.migrate_parameters(params, shapes)
    report = Report(str(path), f"{KINDS['workdir']}, step {meta.get('step')}")
    saved = {n: x.shape for n, x in params.items()}
    names = _matching_names(str(path), saved, shapes, report, fresh)
    return {name: np.asarray(params[name], np.float32) for name in names}, report


def _from_safetensors(
    tensors: TensorFile, shapes: dict[str, Shape], report: Report, fresh: re.Pattern[str]
) -> dict[str, np.ndarray]:
    params = {name: tensors.take(name) for name in tensors}
    params = migrations.migrate_parameters(params, shapes)
    saved = {name: x.shape for name, x in params.items()}
    names = _matching_names(str(tensors.path), saved, shapes, report, fresh)
    return {name: params[name] for name in names}


def _matching_names(
    where: str,
    saved: dict[str, Shape],
    shapes: dict[str, Shape],
    report: Report,
    fresh: re.Pattern[str],
) -> list[str]:
    """Return the names to load from our own weights.

    Only the answer head may differ, and what is initialised anyway.
    """
    head = "fusion/answer/"
    for name, shape in saved.items():
        if name.startswith(head) and shapes.get(name) != tuple(shape):
            report.unused[name] = "the answer head of another task"
        elif fresh.search(name):
            report.unused[name] = "initialised: config.init.reinit matches it"
    names = [name for name in saved if name not in report.unused]
    wanted = {
        n: shape
        for n, shape in shapes.items()
        if n in names or not (n.startswith(head) or fresh.search(n))
    }
    found = {name: tuple(saved[name]) for name in names}
    check_same(found, wanted, where, "use weights of this model or change config.model")
    report.used = {name: name for name in names}
    return names
