"""How a reader declares the data sets that it reads, and what opening one of them returns."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from stoa_jax.data import records
from stoa_jax.data.sources.entries import Entry, Skipped, SkippedRows
from stoa_jax.data.sources.files import Files

# Reads annotations and returns {split: entries}. It decodes no video, and names unusable rows in
# the second argument.
Reader = Callable[[Files, SkippedRows], Mapping[str, Sequence[Entry]]]


@dataclasses.dataclass(frozen=True)
class DataSet:
    """One configuration of a data set: its name, its reader, its tasks and its published counts."""

    name: str  # set/configuration, as users write it
    read: Reader | None  # None if clips are generated and not read from published files
    tasks: tuple[str, ...]  # configs/TASK.py:SET trains on it
    clips: Mapping[str, int] = dataclasses.field(default_factory=dict)  # published number by split
    # Captions or questions by split, where metrics are averages over them.
    items: Mapping[str, int] = dataclasses.field(default_factory=dict)
    about: int = 0  # training clips, where no exact number is published
    answers: int = 0  # size of the answer vocabulary: the most frequent answers of training

    @property
    def set(self) -> str:
        """The name without the configuration."""
        return self.name.partition("/")[0]

    @property
    def configuration(self) -> str:
        """The name without the set."""
        return self.name.partition("/")[2]


class Source(Protocol):
    """An open data set: its entries by split, and the loader of their clips."""

    name: str
    class_names: tuple[str, ...]
    splits: dict[str, Any]  # Sequence[Entry], or other entries with a `video_id`
    skipped: list[Skipped]

    def load(self, entry: Any, frames: int, short_side: int, objects: int) -> records.Clip:
        """Decode one entry into `frames` frames, with at most `objects` objects in each."""
        ...
