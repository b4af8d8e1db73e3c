"""Pre-training: the joint loss with all its parts, evaluated as a retriever."""

from stoa_jax.tasks.base import TaskBase
from stoa_jax.tasks.retrieval import RetrievalEvaluator


class Pretrain(TaskBase):
    """Pre-training by the joint loss; evaluated as a retriever."""

    name = "pretrain"

    def make_evaluator(self) -> RetrievalEvaluator:
        """Rank both ways, by the dual encoder and re-ranked."""
        return RetrievalEvaluator(self)
