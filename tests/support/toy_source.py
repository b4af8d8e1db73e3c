"""A source of small clips for tests, in its own module so that spawned processes find it."""

import dataclasses
import functools
import os
import signal
import time
from pathlib import Path

import numpy as np

from stoa_jax.data import builders, records

SETTINGS = builders.Settings(frames=4, objects=3, short_side=24, tagger="none")


@dataclasses.dataclass(frozen=True)
class Entry:
    video_id: str
    seed: int
    kind: str = "caption"
    fault: str = ""


class Source:
    """Clips of noise with one bright rectangle, whose box is its only object."""

    def __init__(self, counts, kind="caption", faults=(), size=(24, 32), delay=0.0, log=None):
        self.class_names, self.skipped = ("thing", "other"), []
        self.size, self.delay, self.log = size, delay, log
        faults = dict(faults)
        self.splits = {
            split: [
                Entry(f"{split}{i}", i + 1000 * s, kind, faults.get((split, i), ""))
                for i in range(count)
            ]
            for s, (split, count) in enumerate(counts.items())
        }

    def load(self, entry, frames, short_side, objects):
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{entry.video_id}\n")
        time.sleep(self.delay)
        if entry.fault == "raise":
            raise ValueError("moov atom\nnot found")
        if entry.fault == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if entry.fault == "hang":
            time.sleep(3600)
        return clip(entry, frames, objects, self.size)


def clip(entry, frames, objects, size):
    rng = np.random.default_rng(entry.seed)
    height, width = size
    images, boxes = [], np.zeros((frames, objects, 4), np.float32)
    classes = np.full((frames, objects), -1, np.int32)
    scores = np.zeros((frames, objects), np.float32)
    for t in range(frames):
        image = rng.integers(0, 60, (height, width, 3), np.uint8)
        x, y = rng.integers(0, width - 8), rng.integers(0, height - 8)
        image[y : y + 8, x : x + 8] = 250
        images.append(image)
        boxes[t, 0] = np.array([x, y, x + 8, y + 8]) / [width, height, width, height]
        classes[t, 0], scores[t, 0] = entry.seed % 2, 0.9
    texts, answers = words(entry)
    return records.Clip(entry.video_id, images, boxes, classes, scores, texts, answers)


def words(entry):
    i = entry.seed
    if entry.kind == "qa":
        questions = [f"what is {i}?", f"who does {i}?", f"how many {i}?"][: 1 + i % 3]
        return questions, ["red", "dog", "two"][: 1 + i % 3]
    if entry.kind == "multiple_choice":
        return [f"a thing goes {i + j}" for j in range(5)], [str(i % 5)]
    if entry.fault == "empty":
        return ["", "  "], []
    captions = [f"a thing {i} moves", f"the thing number {i} goes left"][: 1 + i % 2]
    return captions + ([" "] if entry.fault == "one empty" else []), []


def build(directory, source, dataset="folder/captions", processes=1, timeout=60.0, **options):
    from stoa_jax.data.build import run as building

    run = functools.partial(building.encode_parts, processes=processes, timeout=timeout)
    options = {"settings": SETTINGS, "run": run, **options}
    return building.build_source(dataset, source, directory, **options)


def tree(directory):
    """Return every file below a directory with its bytes."""
    paths = sorted(p for p in Path(directory).rglob("*") if p.is_file())
    return {str(p.relative_to(directory)): p.read_bytes() for p in paths}
