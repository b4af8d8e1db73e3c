"""The order of examples in training and evaluation.

The *position* of an example in training is `step * batch_size + row`, counted over the whole run
and all hosts. The example at a position is a function of (seed, position) alone. So the number of
hosts, workers and devices changes nothing, and the step is all that is needed to resume.
"""

import bisect
import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np

from stoa_jax.data.split import Split

PERIOD = 1000  # positions after which the pattern of a mixture repeats


@functools.lru_cache(maxsize=16)  # at an epoch's boundary, two permutations of each set are in use
def _permutation(seed: int, which: int, epoch: int, size: int) -> np.ndarray:
    """Return the order of a set's examples in an epoch."""
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

    @functools.cached_property
    def clips(self) -> np.ndarray:
        """Index of the clip of each example."""
        counts = np.diff(self.ends, prepend=0) if self.by_item else 1
        return np.repeat(np.arange(len(self.split)), counts)

    def locate(self, i: int) -> tuple[int, int]:
        """Return (clip, item) of example i; item -1 if the clip is the example."""
        if not self.by_item:
            return i, -1
        clip = int(np.searchsorted(self.ends, i, "right"))
        return clip, i - (int(self.ends[clip - 1]) if clip else 0)


class Slot(NamedTuple):
    """One row of a batch, and the example that fills it."""

    row: int
    position: int
    valid: bool
    example: int
    which: int  # index of the set
    clip: int
    item: int  # of the clip; -1: any of them


@dataclasses.dataclass
class Order:
    """Map from positions to examples; in training it is endless, shuffled and mixed."""

    sets: list[Examples]
    weights: list[float]
    seed: int
    train: bool
    limit: int = 0  # most examples of an evaluation; 0: all

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
        """Return one period of the mixture: the set at each position, its rank there, and totals.

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
        """Return (set, example of the set) at a position in training."""
        which, nth, counts = self._mixture
        period, at = divmod(position, len(which))
        chosen = int(which[at])
        size = len(self.sets[chosen])
        epoch, index = divmod(period * int(counts[chosen]) + int(nth[at]), size)
        return chosen, int(_permutation(self.seed, chosen, epoch, size)[index])

    def slot(self, row: int, position: int) -> Slot:
        """Return the slot of a batch's row: the example at a position."""
        valid = self.train or position < self.length
        if self.train:
            which, index = self._shuffled(position)
            example = self._starts[which] + index
        else:
            example = min(position, self.length - 1)
            which = bisect.bisect_right(self._starts, example) - 1
            index = example - self._starts[which]
        clip, item = self.sets[which].locate(index)
        return Slot(row, position, valid, example, which, clip, item)
