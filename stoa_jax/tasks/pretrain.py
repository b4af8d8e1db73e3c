"""Pre-training: all six losses, evaluated as a retriever."""

import functools
from collections.abc import Mapping

from jax import Array

from stoa_jax.joint_loss import joint_loss
from stoa_jax.models.stoa import Stoa
from stoa_jax.tasks.base import SplitEvaluator, TaskBase
from stoa_jax.tasks.retrieval import RetrievalEvaluator


class Pretrain(TaskBase):
    """Pre-training; evaluated as a retriever."""

    name = "pretrain"

    def loss(
        self, model: Stoa, batch: Mapping[str, Array], key: Array
    ) -> tuple[Array, dict[str, Array]]:
        """The joint loss, as the configuration weighs it."""
        return joint_loss(model, batch, key, self.settings)

    @functools.cached_property
    def _evaluators(self) -> dict[str, SplitEvaluator]:
        return {"retrieval": RetrievalEvaluator(self)}

    def evaluators(self) -> dict[str, SplitEvaluator]:
        """Retrieval on the evaluation split."""
        return self._evaluators
