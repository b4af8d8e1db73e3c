"""The interface of an opened model for saving, the card, the Hub and explanations."""

from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from stoa_jax.inference.sidecars import Calibration
from stoa_jax.inference.videos import Prepared, Preprocessing
from stoa_jax.models.config import ModelConfig
from stoa_jax.text import Tokenizer

if TYPE_CHECKING:
    from stoa_jax.inference.programs import Towers
    from stoa_jax.models.stoa import Stoa


class Opened(Protocol):
    """The part of `stoa_jax.inference.model.Model` that its helper modules use."""

    config: ModelConfig
    kind: str
    source: str
    tokenizer: Tokenizer
    frames: int
    network: "Towers | Stoa | None"
    answers: tuple[str, ...]
    calibration: Calibration | None
    untrained: frozenset[str]
    record: Mapping[str, Any]

    @property
    def whole(self) -> "Stoa | None":
        """The whole STOA-VLP; None for a CLIP or an export."""
        ...

    @property
    def has(self) -> Set[str]:
        """What the model can do."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of weights, tokenizer and preprocessing."""
        ...

    def needs(self, head: str, call: str) -> "Stoa":
        """Return the network, or raise MissingHead."""
        ...

    def preprocessing(self, *, fused: bool = False) -> Preprocessing:
        """Return how a video becomes input."""
        ...

    def tokens(
        self, texts: Sequence[str], call: str, truncate: bool | None, what: str = "text"
    ) -> np.ndarray:
        """Return the ids of checked texts."""
        ...

    def note_missing_detections(self, call: str, clips: Sequence[Prepared]) -> None:
        """Warn once about clips without detections."""
        ...

    def probability(self, logits: np.ndarray) -> np.ndarray:
        """Return calibrated match probabilities of logits."""
        ...
