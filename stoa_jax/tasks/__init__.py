"""The tasks. Each brings its batches, its loss and its evaluators; all share one train loop."""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from stoa_jax.data.pipeline import BatchSpec, Split
from stoa_jax.errors import UserError
from stoa_jax.inference.sidecars import Calibration
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.stoa import Stoa
from stoa_jax.tasks.base import Row


class Evaluator(Protocol):
    """Measures a model on one split.

    The train loop calls it for metrics by name; `stoa_jax.evaluate` asks for the rows and for what
    a comparison of them needs to know about the split.
    """

    config: ConfigDict
    calibration: Calibration  # of the match head
    predictions: dict[str, dict[str, Any]]  # of the latest run, by row name and example

    @property
    def split(self) -> Split:
        """The split that is evaluated."""
        ...

    @property
    def split_name(self) -> str:
        """The split's name, `dataset:split`."""
        ...

    @property
    def missing(self) -> int:
        """Number of clips of the published split that were not built."""
        ...

    @property
    def limit(self) -> int:
        """Most examples to evaluate; 0 for all."""
        ...

    @property
    def full(self) -> int:
        """Number of examples in the whole split."""
        ...

    @property
    def partial(self) -> bool:
        """Whether less than the published split is evaluated."""
        ...

    def leave_out(self, names: Sequence[str], source: str) -> None:
        """Drop the metrics that need the named parameters, which the weights `source` lack."""
        ...

    def rows(self, model: Stoa, mesh: Mesh) -> Iterator[Row]:
        """Yield every metric; every process calls this and gets the same."""
        ...

    def __call__(self, model: Stoa, mesh: Mesh) -> Iterator[tuple[str, float]]:
        """Yield the numeric metrics by name; every process calls this and gets the same."""
        ...


class Task(Protocol):
    """What the train loop, the planner and the evaluation ask of a task."""

    name: str
    config: ConfigDict

    def model_config(self) -> ModelConfig:
        """Return the model's configuration, completed by what the task adds to it."""
        ...

    def batch_spec(self, train: bool) -> BatchSpec:
        """Describe the content of a batch."""
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
    "joint": "joint:Joint",
    "retrieval": "retrieval:Retrieval",
    "captioning": "captioning:Captioning",
    "qa": "qa:QuestionAnswering",
    "multiple_choice": "multiple_choice:MultipleChoice",
}


def make_task(config: ConfigDict) -> Task:
    """Create the task that `config.task` names."""
    if config.task not in TASKS:
        raise UserError(f"config.task: no task {config.task!r}; there are {', '.join(TASKS)}")
    module, name = TASKS[config.task].split(":")
    return getattr(importlib.import_module(f"stoa_jax.tasks.{module}"), name)(config)
