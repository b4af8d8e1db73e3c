"""What the index asks of the store beneath it: rows in, rows out, all or nothing."""

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
    """Rows with vectors, as of when the store was opened or last written through it."""

    @property
    def place(self) -> str:
        """The directory or address, for messages."""
        ...

    @property
    def failures(self) -> Path | None:
        """Where failures are recorded; None where there is no local directory."""
        ...

    @property
    def settings(self) -> Settings:
        """What all rows have in common."""
        ...

    @property
    def searched_by(self) -> str:
        """The library that compares a query with the vectors, with its version."""
        ...

    def __len__(self) -> int: ...

    def ids(self) -> list[str]:
        """Return each id once, in the order in which they were added."""
        ...

    def videos_of(self, ids: Sequence[str]) -> dict[str, str | None]:
        """Return the videos of those ids that are in the store."""
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
        """Hold the writer's lock, on the newest state; may be nested by one thread."""
        ...

    def append(
        self,
        rows: Rows,
        vectors: np.ndarray,
        features: np.ndarray | None = None,
        fingerprint: str | None = None,
    ) -> None:
        """Add rows in one commit; an id with a start that is there already is an error."""
        ...

    def delete(self, ids: Sequence[str]) -> int:
        """Delete all rows of some ids in one commit; an unknown id is an error."""
        ...

    def compact(self) -> None:
        """Give back the space of deleted rows and of many small adds."""
        ...

    def merge(self, parts: Sequence["Store"]) -> None:
        """Add the rows of other stores in one commit."""
        ...

    def set(self, **changes) -> None:
        """Change settings in a commit of its own."""
        ...
