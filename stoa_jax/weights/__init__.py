"""Weights in: CLIP's files, the authors' checkpoint, our own; strict, and accounted for by name.

Every tensor of a file is used, or named as unused with a reason; every parameter is filled, or
named as new.
"""

import json
from pathlib import Path

import jax
import numpy as np
from flax import nnx

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
    "openai": "CLIP of OpenAI's",
    "open_clip": "CLIP in open_clip's names",
    "released": "the authors' STOA-VLP checkpoint",
    "stoa_jax": "safetensors of ours",
    "workdir": "a work directory of ours",
}
METADATA = "stoa_jax"  # the key of our safetensors' metadata that holds the configuration


def is_workdir(path: str | Path) -> bool:
    """Does a run keep its checkpoints there?"""
    return (Path(path) / "checkpoints").is_dir()


def open_weights(path: str | Path) -> tuple[TensorFile, str]:
    """A file's tensors, unread, and whose they are: one of `KINDS`."""
    tensors = open_tensors(path)
    if METADATA in tensors.metadata:
        return tensors, "stoa_jax"
    if any(name.startswith("module.") for name in tensors):  # saved from a distributed run
        tensors = tensors.renamed(lambda name: name.removeprefix("module."))
    kind = "released" if released.is_released(tensors) else clip.kind_of(tensors)
    if kind is None:
        some = ", ".join(list(tensors)[:4])
        raise UserError(
            f"{path}: whose weights these are is not known; it begins with {some}. Known are "
            f"{'; '.join(KINDS.values())}"
        )
    return tensors, kind


def config_of(path: str | Path, *, activation: str | None = None) -> tuple[ModelConfig, str]:
    """The model that the weights at `path` are of, and their kind."""
    if is_workdir(path):
        from stoa_jax.checkpoint import load_params

        return ModelConfig(**load_params(path)[1]), "workdir"
    tensors, kind = open_weights(path)
    return _config(tensors, kind, activation), kind


def _config(tensors: TensorFile, kind: str, activation: str | None = None) -> ModelConfig:
    if kind == "stoa_jax":
        try:
            return ModelConfig(**json.loads(tensors.metadata[METADATA]))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{tensors.path}: its metadata name no model of ours: {error}"
            ) from error
    if kind == "released":
        return released.config_of(tensors)
    return clip.config_of(tensors, kind, activation)


def parameter_shapes(c: ModelConfig) -> dict[str, Shape]:
    """Every parameter of a model by name, and its shape."""
    abstract = jax.eval_shape(lambda: Stoa(c, rngs=nnx.Rngs(0)))
    return {name: tuple(x.shape) for name, x in named_parameters(abstract).items()}


def initial_parameters(
    path: str | Path, model_config: ModelConfig, *, seed: int = 0
) -> tuple[dict[str, np.ndarray], Report]:
    """What the weights at `path` say of a model's parameters, in float32, and the account of it.

    Parameters that are not in the file, and start from nothing that is, are only named:
    `report.new`. `seed` draws the rest of a table of positions that the file fills in part.
    """
    shapes = parameter_shapes(model_config)
    if is_workdir(path):
        params, report = _of_workdir(path, shapes)
        report.new = {name: shape for name, shape in shapes.items() if name not in params}
        return params, report
    tensors, kind = open_weights(path)
    report = Report(str(path), KINDS[kind])
    if kind == "stoa_jax":
        params = _of_ours(tensors, shapes, report)
    elif kind == "released":
        params = released.read_released(tensors, model_config, shapes, report)
    else:
        params = clip.read_clip(tensors, kind, model_config, shapes, report)
        clip.initial_from_clip(params, model_config, shapes, report)
        params["fusion/positions"] = clip.fusion_positions(
            params["text/positions"], shapes["fusion/positions"], seed, report
        )
    report.new = {name: shape for name, shape in shapes.items() if name not in params}
    return dict(sorted(params.items())), report


def whole_parameters(
    path: str | Path, model_config: ModelConfig, *, seed: int = 0
) -> tuple[dict[str, np.ndarray], Report]:
    """`initial_parameters`, and the new ones drawn as a fresh model's are."""
    params, report = initial_parameters(path, model_config, seed=seed)
    return dict(sorted({**params, **_draw(model_config, tuple(report.new), seed)}.items())), report


def _draw(c: ModelConfig, names: tuple[str, ...], seed: int) -> dict[str, np.ndarray]:
    # Under jit, what is not asked for is never drawn: a large model would not fit twice.
    @jax.jit
    def draw(key: jax.Array) -> dict[str, jax.Array]:
        params = named_parameters(Stoa(c, rngs=nnx.Rngs(params=key)))
        return {name: params[name] for name in names}

    return jax.device_get(draw(jax.random.key(seed))) if names else {}


def _of_workdir(path: str | Path, shapes: dict[str, Shape]) -> tuple[dict, Report]:
    from stoa_jax.checkpoint import load_params

    params, _, meta = load_params(path)
    report = Report(str(path), f"{KINDS['workdir']}, step {meta.get('step')}")
    names = _fitting(str(path), {n: x.shape for n, x in params.items()}, shapes, report)
    return {name: np.asarray(params[name], np.float32) for name in names}, report


def _of_ours(
    tensors: TensorFile, shapes: dict[str, Shape], report: Report
) -> dict[str, np.ndarray]:
    there = {n: t.shape for n, t in tensors.items()}
    return {n: tensors.take(n) for n in _fitting(str(tensors.path), there, shapes, report)}


def _fitting(
    where: str, there: dict[str, Shape], shapes: dict[str, Shape], report: Report
) -> list[str]:
    """The names to take from weights of ours; only the answers' head may differ."""
    head = "fusion/answer/"
    for name, shape in there.items():
        if name.startswith(head) and shapes.get(name) != tuple(shape):
            report.unused[name] = "the head of another task's answers"
    names = [name for name in there if name not in report.unused]
    wanted = {n: shape for n, shape in shapes.items() if n in names or not n.startswith(head)}
    found = {name: tuple(there[name]) for name in names}
    check_same(found, wanted, where, "use weights of this model or change config.model")
    report.used = {name: name for name in names}
    return names
