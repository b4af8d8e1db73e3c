"""The synthetic world as a source: clips are rendered when they are loaded."""

import dataclasses
from typing import Any

from stoa_jax.data import records
from stoa_jax.data.sources.dataset import DataSet
from stoa_jax.data.sources.entries import Skipped
from stoa_jax.errors import UserError

DATA_SETS = (
    DataSet("synthetic/captions", None, tasks=("pretrain", "retrieval", "captioning")),
    DataSet("synthetic/qa", None, tasks=("qa",), answers=64),
    DataSet("synthetic/multiple_choice", None, tasks=("multiple_choice",)),
    DataSet("synthetic/pictures", None, tasks=("clip",)),
)
SPLITS = {"train": 3000, "validation": 200, "test": 200}  # clips, unless options say otherwise


@dataclasses.dataclass(frozen=True)
class SyntheticEntry:
    """The clip `index` of a split."""

    video_id: str
    split: str
    index: int


class SyntheticSource:
    """A synthetic data set; options are `seed`, `size`, `siblings`, … and clips by split."""

    def __init__(self, name: str, **options: Any):
        numbers = {"seed": 0, "size": 64, "siblings": 2, "max_objects": 4, "twins": 0, **SPLITS}
        for option, value in options.items():
            if option not in numbers:
                raise UserError(f"{name}: no option {option!r}; there are {', '.join(numbers)}")
            if not str(value).isdecimal():
                raise UserError(f"{name}: {option}={value!r} is not a whole number")
            numbers[option] = int(value)
        from stoa_jax.data import synthetic

        self.name, self.kind = name, name.partition("/")[2]
        self.seed, self.size = numbers["seed"], numbers["size"]
        self.siblings = numbers["siblings"]  # clips in a row that look alike
        self.max_objects = numbers["max_objects"]  # in a clip
        self.twins = numbers["twins"]  # 1: two objects of one class in every clip
        self.class_names = tuple(synthetic.CLASS_NAMES)
        self.skipped: list[Skipped] = []
        self.splits: dict[str, list[SyntheticEntry]] = {
            split: [SyntheticEntry(f"{split}-{i:06d}", split, i) for i in range(numbers[split])]
            for split in SPLITS
        }

    def load(
        self, entry: SyntheticEntry, frames: int, short_side: int, objects: int
    ) -> records.Clip:
        """Render a clip at the option `size`; `short_side` and `objects` have no effect."""
        from stoa_jax.data import synthetic

        world = synthetic.World(
            entry.split,
            self.seed,
            self.size,
            frames=frames,
            siblings=self.siblings,
            max_objects=self.max_objects,
            twins=self.twins,
        )
        render = world.picture if self.kind == "pictures" else world.clip
        clip = synthetic.as_clip(render(entry.index), self.kind)
        return dataclasses.replace(clip, video_id=entry.video_id)
