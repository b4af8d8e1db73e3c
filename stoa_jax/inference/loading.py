"""Weights of any kind, opened as a model that is ready for use.

`stoa_jax.load(PATH)` opens a Hugging Face CLIP directory, an OpenAI or open_clip file, the
authors' checkpoint, a work directory, safetensors of ours, or an export.
"""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from stoa_jax import weights
from stoa_jax.errors import UserError
from stoa_jax.inference import export
from stoa_jax.inference.model import (
    Model,
    Towers,
    frame_tokens,
    text_embedding,
    tokenizer_for,
)
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.parameters import named_parameters, with_parameters
from stoa_jax.models.stoa import Stoa
from stoa_jax.weights import clip


def load(
    path: str | Path,
    *,
    frames: int | None = None,
    activation: str | None = None,
    dtype: str = "float32",
) -> Model:
    """Opens weights of any kind. `frames` is the most that a clip is sampled to (config.frames).

    `activation` is for CLIP files that do not say theirs (`quick_gelu`, `gelu`); `dtype` is that
    of the computation.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or directory")
    if export.is_export(path):
        return export.load_export(path)
    c, kind = weights.config_of(path, activation=activation)
    c = dataclasses.replace(c, dtype=dtype)
    if kind in ("hugging_face", "openai", "open_clip"):
        c = clip.vision_and_text(c)
        model, report = clip_towers(path, c)
        network = None
    else:
        params, report = weights.initial_parameters(path, c)
        if report.new:
            raise UserError(f"{path}: no whole model: missing {', '.join(report.new)}")
        abstract = jax.eval_shape(lambda: Stoa(c, rngs=nnx.Rngs(0)))
        model = network = with_parameters(abstract, _on_device(params))
    frames = c.frames if frames is None else frames
    if frames < 1:
        raise UserError(f"load: frames is {frames}; it must be at least 1")
    run_frames, run_text = jax.jit(frame_tokens), jax.jit(text_embedding)
    return Model(
        c,
        kind,
        tokenizer_for(path, c),
        frames=c.frames if c.joint_blocks else frames,
        encode_frames=partial(run_frames, model),
        encode_tokens=partial(run_text, model),
        network=network,
        report=report,
    )


def clip_towers(path: str | Path, c: ModelConfig) -> tuple[Towers, weights.Report]:
    """Only the two towers of a CLIP file."""
    abstract = jax.eval_shape(lambda: Towers(c, rngs=nnx.Rngs(0)))
    shapes = {name: tuple(x.shape) for name, x in named_parameters(abstract).items()}
    tensors, kind = weights.open_weights(path)
    report = weights.Report(str(path), weights.KINDS[kind])
    params = clip.read_clip(tensors, kind, c, shapes, report)
    return with_parameters(abstract, _on_device(params)), report


def _on_device(params: dict[str, np.ndarray]) -> dict[str, Array]:
    # One at a time, so that a large model is in memory once.
    return {name: jnp.asarray(params.pop(name)) for name in list(params)}
