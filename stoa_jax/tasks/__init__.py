"""The tasks: each brings its batches, its loss and its evaluators; the loop is one for all."""

import importlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from stoa_jax.data.pipeline import BatchSpec
from stoa_jax.errors import UserError
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.stoa import Stoa


class Evaluator(Protocol):
    """Runs over a split and yields figures by name."""

    def __call__(self, model: Stoa, mesh: Mesh) -> Iterator[tuple[str, float]]:
        """`model` holds sharded parameters; every process calls this and gets the same."""
        ...


class Task(Protocol):
    """What the loop asks of a task."""

    name: str

    def model_config(self) -> ModelConfig:
        """The model, with what the task adds to it."""
        ...

    def batch_spec(self, train: bool) -> BatchSpec:
        """What its batches hold."""
        ...

    def loss(
        self, model: Stoa, batch: Mapping[str, Array], key: Array
    ) -> tuple[Array, dict[str, Array]]:
        """A scalar to lower and scalars to watch, averaged over the valid rows; jittable."""
        ...

    def evaluators(self) -> dict[str, Evaluator]:
        """Evaluators by name; the same objects at every call, so that they compile once."""
        ...

    def extras(self) -> dict[str, Any]:
        """What a checkpoint must say for its model to be used without the data set."""
        ...


TASKS = {
    "pretrain": "pretrain:Pretrain",
    "retrieval": "retrieval:Retrieval",
    "captioning": "captioning:Captioning",
    "qa": "qa:QuestionAnswering",
    "multiple_choice": "multiple_choice:MultipleChoice",
}


def make_task(config: ConfigDict) -> Task:
    """The task that `config.task` names."""
    if config.task not in TASKS:
        raise UserError(f"config.task: no task {config.task!r}; there are {', '.join(TASKS)}")
    module, name = TASKS[config.task].split(":")
    return getattr(importlib.import_module(f"stoa_jax.tasks.{module}"), name)(config)
