"""The interface of a model for the index. The models of `stoa_jax.load` have it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from stoa_jax.errors import UserError

if TYPE_CHECKING:
    from stoa_jax.inference.videos import Clip, Preprocessing, Video


class Encoder(Protocol):
    """Encoder of videos and texts into one space."""

    @property
    def fingerprint(self) -> str:
        """Identifier that two models share only if they give equal vectors."""
        ...

    def preprocessing(self) -> "Preprocessing":
        """Return how a video becomes the input of `encode_video`."""
        ...

    def encode_video(self, videos: "Sequence[Video | Clip]", *, batch_size: int = 16) -> np.ndarray:
        """Return unit vectors float32 [n, d]."""
        ...

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """Return unit vectors float32 [n, d]."""
        ...


def dimensions(encoder: Encoder) -> int:
    """Return the width of an encoder's vectors."""
    return encoder.encode_text(["a video"]).shape[1]


def check_fingerprint(place: str, held: str | None, rows: int, encoder: Encoder) -> None:
    """Raise UserError unless vectors of an index and of an encoder can be compared."""
    if held is None and rows:
        raise UserError(
            f"{place}: it holds vectors of an unnamed model, which may not be "
            f"{encoder.fingerprint}; open it without a model, or build it again with "
            "add_vectors(..., fingerprint=model.fingerprint)"
        )
    if held is not None and held != encoder.fingerprint:
        raise UserError(
            f"{place}: it holds vectors of model {held}, and this model is {encoder.fingerprint}: "
            "scores of two models do not compare; open it with the model that filled it (weights, "
            "tokenizer, frames and size all count)"
        )
