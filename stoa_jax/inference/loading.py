"""Open weights of any kind as a model that is ready for use: `stoa_jax.load`."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax import Array

from stoa_jax import weights
from stoa_jax.errors import InputError, UserError
from stoa_jax.inference import export, run_record, sidecars
from stoa_jax.inference.model import Model
from stoa_jax.inference.programs import Towers
from stoa_jax.inference.tokenizers import tokenizer_for
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.parameters import named_parameters, with_parameters
from stoa_jax.models.stoa import Stoa
from stoa_jax.weights import clip

CLIP_KINDS = ("hugging_face", "openai", "open_clip")
SYNTHETIC = Path(__file__).parents[1] / "checkpoints" / "synthetic"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def load(
    path_or_name: str | Path,
    *,
    frames: int | None = None,
    dtype: str = "float32",
    truncate: bool = False,
    activation: str | None = None,
) -> Model:
    """Open weights of any kind as a model.

    `path_or_name` is a work directory, our safetensors or a saved model, a Hugging Face CLIP
    directory, an OpenAI or open_clip file, the authors' checkpoint, an export, "synthetic" (the
    checkpoint that ships with the package), or a name on the Hugging Face Hub. `frames` is the
    number of frames that `encode_video` samples from a video, by default `config.frames`. `dtype`
    is that of the computation. With `truncate`, texts are cut to the model's length. `activation`
    is for CLIP files that do not state theirs ("quick_gelu", "gelu").

    >>> model = stoa_jax.load("synthetic")
    >>> sorted(model.has)
    ['actions', 'answer', 'caption', 'embed', 'match', 'trajectories']
    """
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"load: dtype is {dtype!r}; use 'float32' or 'bfloat16'")
    if frames is not None and (not isinstance(frames, int) or frames < 1):
        raise InputError(f"load: frames is {frames!r}; it must be an integer of 1 or more")
    path = locate(path_or_name)
    settings = sidecars.read(path, sidecars.SETTINGS) or {}
    if export.is_export(path):
        return export.load_export(path, frames=frames, truncate=truncate)
    c, kind = weights.config_of(path, activation=activation)
    # The run that saved the weights chose these for its own device.
    c = dataclasses.replace(c, dtype=dtype, attention="auto")
    answers: tuple[str, ...] = ()
    if kind in CLIP_KINDS:
        c = clip.vision_and_text(c)
        network, report = clip_towers(path, c)
    else:
        params, report = weights.initial_parameters(path, c)
        if report.new:
            some = ", ".join(list(report.new)[:5]) + (", …" if len(report.new) > 5 else "")
            raise UserError(
                f"{path}: not a whole model: {len(report.new)} parameters are missing ({some}); "
                "another version may have saved it: load it with that version, or train it again"
            )
        abstract = jax.eval_shape(lambda: Stoa(c, rngs=nnx.Rngs(0)))
        network = with_parameters(abstract, _on_device(params))
        answers = sidecars.read_answers(path) or run_answers(path, kind)
        if answers and c.answer_head == "classifier" and len(answers) > c.num_answers:
            raise UserError(
                f"{sidecars.path_of(path, sidecars.ANSWERS)}: {len(answers)} answers for a head of "
                f"{c.num_answers} classes; is it the list of another model?"
            )
    untrained = set(settings.get("untrained", ()))
    if kind == "stoa_jax":
        metadata = weights.open_weights(path)[0].metadata
        untrained |= set(json.loads(metadata.get(weights.UNTRAINED, "[]")))
    sampled = frames or settings.get("frames") or c.frames
    if c.joint_blocks and sampled != c.frames:
        raise InputError(
            f"load: frames={sampled}, but the frames of this model attend to each other and it "
            f"always reads {c.frames}; leave frames out"
        )
    return Model(
        c,
        kind,
        tokenizer_for(path, c),
        frames=sampled,
        network=network,
        truncate=truncate,
        answers=answers,
        calibration=sidecars.read_calibration(path),
        untrained=sorted(untrained),
        record=run_record.read(path),
        report=report,
        source=path_or_name if Path(path_or_name).exists() else str(path_or_name),
    )


def locate(path_or_name: str | Path) -> Path:
    """Return the path of a model: on this machine, the shipped one, or one from the Hub."""
    path = Path(path_or_name)
    if path.exists():
        return path
    name = str(path_or_name)
    if name == "synthetic":
        if SYNTHETIC.is_dir():
            return SYNTHETIC
        raise UserError(
            f"{name}: this installation has no shipped checkpoint at {SYNTHETIC}; install the "
            "package again"
        )
    if _HUB_NAME.fullmatch(name):
        from stoa_jax.inference import hub

        return hub.download(name)
    raise UserError(f"{path}: no such file or directory")


def clip_towers(path: str | Path, c: ModelConfig) -> tuple[Towers, weights.Report]:
    """Read only the two towers of a CLIP file."""
    abstract = jax.eval_shape(lambda: Towers(c, rngs=nnx.Rngs(0)))
    shapes = {name: tuple(x.shape) for name, x in named_parameters(abstract).items()}
    tensors, kind = weights.open_weights(path)
    report = weights.Report(str(path), weights.KINDS[kind])
    params = clip.read_clip(tensors, kind, c, shapes, report)
    return with_parameters(abstract, _on_device(params)), report


def run_answers(path: Path, kind: str) -> tuple[str, ...]:
    """Return the answers that a question-answering run keeps in its checkpoint."""
    if kind != "workdir":
        return ()
    from stoa_jax.checkpoint import load_params

    return tuple(load_params(path)[2].get("extras", {}).get("answers", ()))


def _on_device(params: dict[str, np.ndarray]) -> dict[str, Array]:
    # One at a time, so that a large model is in memory only once. `jnp.asarray` would compile a
    # program for each shape.
    return {name: jax.device_put(params.pop(name)) for name in list(params)}
