"""Splits of the synthetic world without a build: rendered into memory on first use.

Ids, texts, boxes and JPEG bytes are those that `data.build` writes with the same options.
Parts of speech come from the world itself. Nothing here imports TFDS, Grain or spaCy, so JAX and
OpenCV suffice for training on it. All kinds of a split share one rendering of its clips. Given a
folder, a split of some size is rendered once and read from there by later runs.
"""

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stoa_jax.data import records
from stoa_jax.data import split as built
from stoa_jax.data.synthetic import (
    CLASS_NAMES,
    KINDS,
    World,
    as_clip,
    parts_of_speech,
    scene,
    stored,
)
from stoa_jax.errors import UserError

_CHUNK = 250  # clips that a process renders at a time
_ALONE = 1000  # up to this many clips, other processes or a file would not save time


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the build and sizes, which decide the clips of a live split."""

    frames: int
    objects: int
    seed: int = 0
    size: int = 64
    siblings: int = 2
    max_objects: int = 4
    twins: int = 0


class LiveSplit(built.Split):
    """One split of the world, by index. It is in memory, so other processes cannot read it."""

    def __init__(self, kind: str, split: str, count: int, options: Options, folder: str = ""):
        self.dataset, self.split = f"synthetic/{kind}", split
        self.directory = Path(f"synthetic/{kind} (live)")  # a name for messages
        self.frames, self.objects = options.frames, options.objects
        self.class_names = tuple(CLASS_NAMES)
        self._kind, self._count, self._options, self._folder = kind, count, options, folder

    def __len__(self) -> int:
        return self._count

    def __getstate__(self) -> dict[str, Any]:
        raise UserError(
            f"{self.dataset} is live, in the memory of this process; set data.workers to 0"
        )

    @property
    def stored_name(self) -> str:
        """Name of the file that would store the clips of this split."""
        pictures = self._kind == "pictures"
        return stored.name_of(self._options, self.split, self._count, pictures)

    @functools.cached_property
    def _source(self) -> list[dict[str, Any]]:
        pictures = self._kind == "pictures"
        made = drawn(self._options, self.split, self._count, pictures, self._folder)
        return [clip[self._kind] for clip in made]

    @functools.cached_property
    def _listed(self) -> list[built.Metadata]:
        return [built.metadata_of(record) for record in self._source]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of all ids, texts and answers, in order; equal to that of the built set."""
        return built.fingerprint(self._listed)


def open_split(
    dataset: str,
    split: str,
    world: Mapping[str, int],
    frames: int,
    objects: int,
    folder: str = "",
) -> LiveSplit:
    """Open a split of `synthetic/KIND`.

    `world` is the configuration's section `data.world`, and `folder` its `data.live_dir`.
    """
    name, _, kind = dataset.partition("/")
    if name != "synthetic" or kind not in KINDS:
        known = ", ".join(f"synthetic/{k}" for k in KINDS)
        raise UserError(
            f"data.live: {dataset!r} cannot be rendered live, only {known}; unset data.live"
        )
    if split not in scene.SPLITS:
        raise UserError(f"{dataset} has no split {split!r}; it has {', '.join(scene.SPLITS)}")
    if world[split] < 1:
        raise UserError(f"data.world.{split} is {world[split]}; it must be at least 1")
    rest = {name: value for name, value in world.items() if name not in scene.SPLITS}
    return LiveSplit(kind, split, world[split], Options(frames, objects, **rest), folder)


@functools.lru_cache(maxsize=6)
def drawn(
    options: Options, split: str, count: int, pictures: bool, folder: str = ""
) -> stored.Clips:
    """Return the first `count` clips of a split, each as a record of every kind.

    More than `_ALONE` clips are written to `folder`, or read from there if they are.
    """
    what = "pictures" if pictures else "clips"
    path = None
    if folder and count > _ALONE:
        path = Path(folder) / stored.name_of(options, split, count, pictures)
    began = time.monotonic()
    if path and path.exists():
        clips = stored.read(path)
        _say(f"read {count} {what} of {split!r} from {path}", began)
        return clips
    processes = min(len(os.sched_getaffinity(0)), -(-count // _CHUNK))
    starts = range(0, count, _CHUNK)
    jobs = [(options, split, start, min(start + _CHUNK, count), pictures) for start in starts]
    if processes == 1 or count <= _ALONE:
        parts = [draw_chunk(*job) for job in jobs]
    else:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(processes, context) as pool:
            parts = list(pool.map(draw_chunk, *zip(*jobs, strict=True)))
    clips = [clip for part in parts for clip in part]
    if count > _ALONE:
        _say(f"rendered {count} {what} of {split!r}", began)
    if path:
        stored.write(path, clips)
    return clips


def _say(what: str, began: float) -> None:
    print(f"{what} in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def draw_chunk(options: Options, split: str, start: int, stop: int, pictures: bool) -> stored.Clips:
    """Return the clips `start` to `stop` as records by kind."""
    world = World(
        split,
        options.seed,
        options.size,
        frames=options.frames,
        siblings=options.siblings,
        max_objects=options.max_objects,
        twins=options.twins,
    )
    kinds = ("pictures",) if pictures else tuple(k for k in KINDS if k != "pictures")
    found = []
    for i in range(start, stop):
        clip = world.picture(i) if pictures else world.clip(i)
        clip = dataclasses.replace(clip, video_id=f"{split}-{i:06d}")
        frames = [records.encode_jpeg(frame) for frame in clip.frames]
        by_kind = {}
        for kind in kinds:
            item = dataclasses.replace(as_clip(clip, kind), frames=frames)
            encoded = records.encode(item, parts_of_speech.parse, options.frames, options.objects)
            by_kind[kind] = encoded.example
        found.append(by_kind)
    return found
