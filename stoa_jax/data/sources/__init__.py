"""All data sets by name, and the function that opens one.

`open_source("msrvtt/retrieval", DIR)` reads the annotations and decodes nothing; the `load` method
of what it returns decodes one entry. `DATA_SETS` is the one list of data sets: TFDS builders, the
checks, the arguments of `configs/` and the tests derive from it. To add a data set, write a module
here that declares `DATA_SETS` and add it to the list; CONTRIBUTING.md has the recipe.
"""

import itertools
import os
from pathlib import Path
from typing import Any

from stoa_jax.data.sources import didemo, folder, lsmdc, msrvtt, msvd, synthetic, webvid
from stoa_jax.data.sources.dataset import DataSet, Source
from stoa_jax.data.sources.entries import Entry, Skipped, SkippedRows, Undetected
from stoa_jax.data.sources.files import Files
from stoa_jax.data.sources.video_source import VideoSource
from stoa_jax.errors import UserError

__all__ = [
    "DATA_SETS",
    "DataSet",
    "Entry",
    "Skipped",
    "Source",
    "Undetected",
    "VideoSource",
    "configurations",
    "data_set_for",
    "expected_clips",
    "find",
    "open_source",
    "published",
    "sets_for",
]

_MODULES = (synthetic, folder, webvid, msrvtt, msvd, lsmdc, didemo)
DATA_SETS: dict[str, DataSet] = {d.name: d for module in _MODULES for d in module.DATA_SETS}


def configurations() -> dict[str, tuple[str, ...]]:
    """Return the configurations of each set, such as `{"msvd": ("captioning", …)}`."""
    by_set = itertools.groupby(DATA_SETS.values(), key=lambda d: d.set)
    return {name: tuple(d.configuration for d in group) for name, group in by_set}


def find(name: str) -> DataSet:
    """Return the data set `set/configuration`, or raise UserError with the known names."""
    if name not in DATA_SETS:
        raise UserError(f"no data set {name!r}; there are {', '.join(DATA_SETS)}")
    return DATA_SETS[name]


def sets_for(task: str) -> dict[str, DataSet]:
    """Return the data sets that `configs/TASK.py` trains on, by set, such as "msvd"."""
    return {d.set: d for d in DATA_SETS.values() if task in d.tasks}


def data_set_for(task: str, name: str) -> DataSet:
    """Return the data set that `configs/TASK.py:NAME` trains on, or raise UserError."""
    found = sets_for(task)
    if name not in found:
        raise UserError(f"configs/{task}.py:{name}: the sets are {', '.join(found)}")
    return found[name]


def published(name: str, split: str) -> tuple[int | None, int | None]:
    """Return the published numbers of clips and of items of a split; None where none is known."""
    data_set = DATA_SETS.get(name)
    if data_set is None:
        return None, None
    return data_set.clips.get(split), data_set.items.get(split)


def expected_clips(name: str, split: str) -> int:
    """Return the published number of clips of a split, even if it is approximate; 0 if unknown."""
    clips, _ = published(name, split)
    about = DATA_SETS[name].about if name in DATA_SETS and split == "train" else 0
    return clips or about


def open_source(
    name: str,
    manual_dir: str | os.PathLike[str] | None,
    *,
    detections: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Source:
    """Open the data set `name`; all but the synthetic ones read published files in `manual_dir`."""
    data_set = find(name)
    if data_set.read is None:
        return synthetic.SyntheticSource(name, **options)
    if manual_dir is None:
        raise UserError(f"{name} reads its published files: give --manual-dir=DIR")
    if not Path(manual_dir).is_dir():
        raise UserError(f"--manual-dir={manual_dir}: no such directory")
    if options:
        raise UserError(f"{name}: no option {sorted(options)[0]!r}")
    files, skipped = Files(manual_dir), SkippedRows()
    splits = {s: entries for s, entries in data_set.read(files, skipped).items() if len(entries)}
    if not splits:
        first = f"; the first: {skipped.rows[0]}" if skipped.rows else ""
        raise UserError(f"{name} in {manual_dir}: no usable entry{first}")
    found = None
    if detections is not None:
        from stoa_jax.data.detections import open_detections

        found = open_detections(detections)
    return VideoSource(name, splits, skipped.rows, manual_dir, found)
