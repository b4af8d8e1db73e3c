"""Re-ranking by the fusion encoder, from features stored with each segment."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from stoa_jax.errors import UserError
from stoa_jax.index.encoder import Encoder

if TYPE_CHECKING:
    from stoa_jax.inference.model import Model
    from stoa_jax.inference.videos import Prepared, Preprocessing


class Fusion:
    """The match head of a model, applied to stored features."""

    def __init__(self, model: Encoder):
        if "match" not in getattr(model, "has", ()):
            raise UserError(
                "an index with fusion features needs a model with a match head, and this one has "
                f"{', '.join(sorted(getattr(model, 'has', ()))) or 'none'}"
            )
        self._model = cast("Model", model)  # only a Model has a match head

    @property
    def preprocessing(self) -> "Preprocessing":
        """Return how a video becomes the input of `encode`."""
        return self._model.preprocessing(fused=True)

    @property
    def threshold(self) -> float | None:
        """The model's threshold for one pair, or None if it was not calibrated."""
        try:
            return self._model.threshold
        except UserError:
            return None

    def encode(self, clips: "Sequence[Prepared]") -> np.ndarray:
        """Return the features of prepared clips, float16 [n, f]."""
        from stoa_jax.inference import stored

        return stored.encode(self._model, clips)

    def match(self, features: np.ndarray, text: str) -> np.ndarray:
        """Return the probability that a text matches each of the segments, float32 [n]."""
        from stoa_jax.inference import stored

        return stored.match(self._model, features, text)
