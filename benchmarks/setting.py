"""Our training step, and a batch of random clips, for benchmarks that need no data set.

Imports only JAX, Flax, Optax and NumPy, so that it runs on a machine with nothing else installed.
"""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from stoa_jax.joint_loss import joint_loss
from stoa_jax.models.config import ModelConfig
from stoa_jax.program import Program, State, make_program

LOSSES = ("vtc", "vtm", "mlm", "plm", "ota", "asp")
# Compiler options for programs whose speed does not matter.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
EVERYTHING = ((r".*", 1e-5),)  # (regex, learning rate): all parameters learn
FROZEN_VISION = ((r"^visual/", 0.0), (r".*", 1e-3))


def toy() -> ModelConfig:
    """Return sizes that compile in seconds and still use every part of the model."""
    return ModelConfig(
        image_size=24,
        patch_size=8,
        frames=3,
        vision_width=48,
        vision_depth=3,
        vision_heads=3,
        vocab_size=1024,
        text_length=10,
        text_positions=12,
        text_width=32,
        text_depth=1,
        text_heads=2,
        objects_per_frame=4,
        trajectories=5,
        action_tokens=3,
        object_block=1,
        action_block=2,
        trajectory_depth=1,
        trajectory_layers_run=1,
        action_depth=1,
        roi_size=2,
        fusion_depth=2,
        fusion_heads=2,
    )


def model_config(name: str, **changes: Any) -> ModelConfig:
    """Return the configuration `toy` or a named variant of `ModelConfig`, with changed fields."""
    c = toy() if name == "toy" else getattr(ModelConfig, name)()
    return dataclasses.replace(c, **changes)


def random_batch(
    c: ModelConfig, clips: int, seed: int = 0, language: int | None = None
) -> dict[str, np.ndarray]:
    """Return random clips as the loader delivers them: varied captions, boxes, and padding.

    With `language`, the captions use only so many of the vocabulary's ids, start and end included.
    """
    rng = np.random.default_rng(seed)
    shape = (clips, c.frames, c.objects_per_frame)
    length = rng.integers(min(6, c.text_length - 2), c.text_length - 1, (clips, 1))
    at = np.arange(c.text_length)[None]
    words = rng.integers(1, (language or c.vocab_size) - 2, (clips, c.text_length))
    tokens = np.where(at < length, words, np.where(at == length, c.vocab_size - 1, 0))
    tokens[:, 0] = c.vocab_size - 2
    # A third of the words are nouns and a sixth verbs; tags 1 and 3, see `objectives`.
    tags = rng.choice([0, 0, 0, 1, 1, 3], tokens.shape) * ((at > 0) & (at < length))
    low, size = rng.uniform(0, 0.5, (*shape, 2)), rng.uniform(0.2, 0.5, (*shape, 2))
    classes = rng.integers(0, max(4, c.trajectories), shape)
    absent = rng.random(shape) < 0.2
    return {
        "pixels": rng.integers(
            0, 256, (clips, c.frames, c.image_size, c.image_size, 3), dtype=np.uint8
        ),
        "boxes": np.concatenate([low, low + size], -1).astype(np.float32),
        "classes": np.where(absent, -1, classes).astype(np.int32),
        "scores": rng.uniform(0.1, 1, shape).astype(np.float32),
        "tokens": tokens.astype(np.int32),
        "tags": tags.astype(np.int8),
        "valid": np.ones(clips, bool),
        "index": np.arange(clips, dtype=np.int32),
    }


def random_parameters(program: Program, std: float = 0.1) -> dict[str, np.ndarray]:
    """Return random parameters, also for scales and biases, so that swapped ones are noticed."""
    rng = np.random.default_rng(0)
    return {
        name: np.asarray(name.endswith("scale") + std * rng.standard_normal(p.shape, np.float32))
        for name, p in program.state.params.items()
    }


class Weights(SimpleNamespace):
    """The section `loss` of a configuration."""

    def to_dict(self) -> dict[str, Any]:
        """Return the settings by name."""
        return vars(self)


def step_config(
    clips: int, *, groups: tuple[tuple[str, float], ...] = EVERYTHING, **losses: float
) -> Any:
    """Return the part of a configuration that `make_program` reads; `losses` overrides weights."""
    return SimpleNamespace(
        seed=0,
        loss=Weights(
            **{**dict.fromkeys(LOSSES, 1.0), "verb": 0.0, "adjective": 0.0, **losses},
            mask_rate=0.15,
            proper_nouns=False,
            matching="device",
            none_weight=1.0,
            target="sentence",
            match_names=False,
            seen_words=False,
        ),
        train=SimpleNamespace(batch_size=clips, accumulate=1),
        mesh=dict(data=-1, fsdp=1, tensor=1),
        optim=SimpleNamespace(
            groups=groups,
            weight_decay=0.2,
            no_decay=r"(bias|scale|positions|frame_embedding|slot_embedding)$",
            betas=(0.9, 0.98),
            clip_norm=1.0,
            warmup=0.1,
            schedule="cosine",
        ),
    )


class RandomTask:
    """Pre-training on random clips."""

    name = "pretrain"

    def __init__(self, config: Any, model: ModelConfig, language: int | None = None):
        self.config, self._model = config, model
        ids = None if language is None else language_ids(model, language)
        self._words = {} if ids is None else {"words": ids}

    def model_config(self) -> ModelConfig:
        """Return the model's configuration."""
        return self._model

    def loss(self, model: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict]:
        """Return the sum of the losses, and all of them by name."""
        return joint_loss(model, batch, key, self.config.loss.to_dict(), **self._words)


def language_ids(c: ModelConfig, language: int) -> np.ndarray:
    """Return the ids that `random_batch` uses for a language of so many ids."""
    return np.array([*range(1, language - 2), c.vocab_size - 2, c.vocab_size - 1], np.int32)


def our_program(
    c: ModelConfig,
    config: Any,
    device: jax.Device,
    steps: int = 1000,
    language: int | None = None,
) -> tuple[Program, RandomTask]:
    """Return the jitted training step for one device, as training runs it, and its task.

    With `language`, language models choose among the ids of that language, as `loss.seen_words`
    has it.
    """
    task = RandomTask(config, c, language)
    return make_program(config, task, steps, devices=[device]), task


def abstract(batch: dict[str, np.ndarray]) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes and types of a batch."""
    return {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}


def metrics_by_name(program: Program, values: jax.Array) -> dict[str, float]:
    """Return the second output of a step by name."""
    return dict(zip(program.metrics, np.asarray(values).tolist(), strict=True))


__all__ = [
    "EVERYTHING",
    "FROZEN_VISION",
    "LOSSES",
    "QUICK",
    "RandomTask",
    "State",
    "abstract",
    "language_ids",
    "metrics_by_name",
    "model_config",
    "our_program",
    "random_batch",
    "random_parameters",
    "step_config",
    "toy",
]
