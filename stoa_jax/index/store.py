"""The interface between the index and its store: rows in, rows out, changed atomically."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from stoa_jax.index.exact import Found
from stoa_jax.index.manifest import Settings
from stoa_jax.index.rows import Rows

Block = tuple[Rows, np.ndarray, np.ndarray | None]  # rows, vectors, fusion features


class Store(Protocol):
    """Rows with vectors, as of the opening of the store or the last write through it."""

    @property
    def place(self) -> str:
        """The directory or address, for messages."""
        ...

    @property
    def failures(self) -> Path | None:
        """Path of the record of failures; None if there is no local directory."""
        ...

    @property
    def settings(self) -> Settings:
        """Settings that all rows share."""
        ...

    @property
    def searched_by(self) -> str:
        """The library that compares a query with the vectors, with its version."""
        ...

    def __len__(self) -> int: ...

    def ids(self) -> list[str]:
        """Return each id once, in the order of addition."""
        ...

    def videos_of(self, ids: Sequence[str]) -> dict[str, str | None]:
        """Return the videos of the given ids that are in the store."""
        ...

    def search(self, queries: np.ndarray, k: int) -> list[Found]:
        """Return the best rows for each query [q, d] in float64."""
        ...

    def features(self, found: Found) -> np.ndarray:
        """Return the fusion features of found rows, in their order: float16 [k, f]."""
        ...

    def blocks(self) -> Iterator[Block]:
        """Yield the rows with their vectors and features, some thousands at a time."""
        ...

    def writing(self, action: str) -> contextlib.AbstractContextManager[None]:
        """Hold the writer's lock on the newest state; one thread may nest it."""
        ...

    def append(
        self,
        rows: Rows,
        vectors: np.ndarray,
        features: np.ndarray | None = None,
        fingerprint: str | None = None,
    ) -> None:
        """Add rows in one commit; an existing id with the same start raises UserError."""
        ...

    def delete(self, ids: Sequence[str]) -> int:
        """Delete all rows of some ids in one commit; an unknown id raises UserError."""
        ...

    def compact(self) -> None:
        """Free the space of deleted rows and of many small additions."""
        ...

    def merge(self, parts: Sequence["Store"]) -> None:
        """Add the rows of other stores in one commit."""
        ...

    def set(self, **changes) -> None:
        """Change settings in a separate commit."""
        ...
