"""Which example stands where: the index space of a split or a mixture, and its order.

The *position* of an example in training is `step * batch_size + row`, over the whole run and all
hosts. What stands there is a function of (seed, position) alone, so the number of hosts, workers
and devices changes nothing, and the step is the state to resume from.
"""

import bisect
import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np

from stoa_jax.data.split import Split

PERIOD = 1000  # positions after which a mixture repeats which set stands where


@functools.lru_cache(maxsize=16)  # two epochs of each set are in use where one ends
def _permutation(seed: int, which: int, epoch: int, size: int) -> np.ndarray:
    """The order of a set in an epoch."""
    return np.random.default_rng((seed, which, epoch)).permutation(size)


class Examples:
    """The examples of a split: clips, or the items (questions, choices, captions) of all clips."""

    def __init__(self, split: Split, by_item: bool):
        self.split, self.by_item = split, by_item
        if self.by_item:
            counts = [
                len(m.answers or m.texts) for m in (split.metadata(i) for i in range(len(split)))
            ]
            self.ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.by_item else len(self.split)

    def locate(self, i: int) -> tuple[int, int]:
        """(clip, item) of example i; item -1 where the clip is the example."""
        if not self.by_item:
            return i, -1
        clip = int(np.searchsorted(self.ends, i, "right"))
        return clip, i - (int(self.ends[clip - 1]) if clip else 0)


class Place(NamedTuple):
    """A row of the batch, and which example belongs there."""

    row: int
    position: int
    valid: bool
    example: int
    which: int  # of the sets
    clip: int
    item: int  # of the clip; -1: any


@dataclasses.dataclass
class Order:
    """position -> which example of which set; in training an endless one, shuffled and mixed."""

    sets: list[Examples]
    weights: list[float]
    seed: int
    train: bool
    limit: int = 0  # examples of an evaluation at most; 0: all

    def __post_init__(self) -> None:
        self._starts = [0, *np.cumsum([len(e) for e in self.sets]).tolist()]
        self.length = self._starts[-1]
        if self.limit and not self.train:
            self.length = min(self.length, self.limit)

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    @functools.cached_property
    def _mixture(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One period of the mixture: at each position which set, the how-manieth of it, and totals.

        The sets take turns as evenly as their weights allow.
        """
        shares = np.array(self.weights, float) / sum(self.weights)
        period = 1 if len(self.sets) == 1 else PERIOD
        counts = np.zeros(len(shares), np.int64)
        which, nth = np.zeros(period, np.int64), np.zeros(period, np.int64)
        for i in range(period):
            chosen = int(np.argmax(shares * (i + 1) - counts))
            which[i], nth[i] = chosen, counts[chosen]
            counts[chosen] += 1
        return which, nth, counts

    def _shuffled(self, position: int) -> tuple[int, int]:
        """(set, example of the set) at a position of training."""
        which, nth, counts = self._mixture
        period, at = divmod(position, len(which))
        chosen = int(which[at])
        size = len(self.sets[chosen])
        epoch, index = divmod(period * int(counts[chosen]) + int(nth[at]), size)
        return chosen, int(_permutation(self.seed, chosen, epoch, size)[index])

    def place(self, row: int, position: int) -> Place:
        """What stands at a position, for a row of the batch."""
        valid = self.train or position < self.length
        if self.train:
            which, index = self._shuffled(position)
            example = self._starts[which] + index
        else:
            example = min(position, self.length - 1)
            which = bisect.bisect_right(self._starts, example) - 1
            index = example - self._starts[which]
        clip, item = self.sets[which].locate(index)
        return Place(row, position, valid, example, which, clip, item)
