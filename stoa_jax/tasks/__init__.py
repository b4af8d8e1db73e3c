"""The tasks. Each brings its batches, its loss and its evaluators; all share one train loop."""

import importlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from stoa_jax.data.pipeline import BatchSpec, Split
from stoa_jax.errors import UserError
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.stoa import Stoa
from stoa_jax.tasks.base import TaskBase


class Evaluator(Protocol):
    """The interface of an evaluator for the train loop."""

    def __call__(self, model: Stoa, mesh: Mesh) -> Iterator[tuple[str, float]]:
        """Yield metrics by name; every process calls this and gets the same values."""
        ...


class Task(Protocol):
    """The interface of a task for the train loop and the planner; `TaskBase` adds evaluation."""

    name: str
    config: ConfigDict

    def model_config(self) -> ModelConfig:
        """Return the model's configuration, completed by the task."""
        ...

    def batch_spec(self, train: bool) -> BatchSpec:
        """Describe the content of a batch."""
        ...

    @property
    def train_set(self) -> str:
        """Name of the first data set of the training mixture."""
        ...

    def open_split(self, dataset: str, split: str) -> Split:
        """Open a split of a data set."""
        ...

    def loss(
        self, model: Stoa, batch: Mapping[str, Array], key: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Return the scalar to minimise and metrics to watch, averaged over valid rows."""
        ...

    def evaluators(self) -> Mapping[str, Evaluator]:
        """Return the evaluators by name: the same objects at every call, so they compile once."""
        ...

    def extras(self) -> dict[str, Any]:
        """Return what a checkpoint records so that its model can be used without the data set."""
        ...


TASKS = {
    "pretrain": "pretrain:Pretrain",
    "retrieval": "retrieval:Retrieval",
    "captioning": "captioning:Captioning",
    "qa": "qa:QuestionAnswering",
    "multiple_choice": "multiple_choice:MultipleChoice",
    "joint": "joint:Joint",
}


def make_task(config: ConfigDict) -> TaskBase:
    """Create the task that `config.task` names."""
    if config.task not in TASKS:
        raise UserError(f"config.task: no task {config.task!r}; there are {', '.join(TASKS)}")
    module, name = TASKS[config.task].split(":")
    return getattr(importlib.import_module(f"stoa_jax.tasks.{module}"), name)(config)
