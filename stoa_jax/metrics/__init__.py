"""Metrics of the four tasks, computed by the standard tools or equal to them."""

from stoa_jax.metrics.captions import authors_caption_scores, caption_scores
from stoa_jax.metrics.ranking import (
    chance,
    dual_softmax,
    grouped_video_to_text,
    retrieval,
    retrieval_in_blocks,
)

__all__ = [
    "authors_caption_scores",
    "caption_scores",
    "chance",
    "dual_softmax",
    "grouped_video_to_text",
    "retrieval",
    "retrieval_in_blocks",
]
