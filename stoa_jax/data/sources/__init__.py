"""Data sets as published: from annotation files and videos to entries, and from those to clips.

`open_source("msrvtt/retrieval", DIR)` reads the annotations and decodes nothing; `load` decodes one
entry. To add a data set: a module here with `read_<configuration>(files, skipped)` that returns
{split: entries}, a line in `_READERS`, and its published counts in `counts.py`.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import PurePath

import numpy as np

from stoa_jax.data import records, video
from stoa_jax.data.sources import didemo, folder, lsmdc, msrvtt, msvd, webvid
from stoa_jax.data.sources.counts import EXPECTED, EXPECTED_ITEMS
from stoa_jax.data.sources.entries import Entry, Skipped, SkippedRows, Undetected
from stoa_jax.data.sources.files import Files
from stoa_jax.errors import UserError

__all__ = [
    "EXPECTED",
    "EXPECTED_ITEMS",
    "NAMES",
    "Entry",
    "Skipped",
    "Undetected",
    "VideoSource",
    "open_source",
]

_READERS = {
    "folder/captions": folder.read_captions,
    "webvid/captions": webvid.read_captions,
    "msrvtt/captioning": msrvtt.read_captioning,
    "msrvtt/retrieval": msrvtt.read_retrieval,
    "msrvtt/qa": msrvtt.read_qa,
    "msrvtt/multiple_choice": msrvtt.read_multiple_choice,
    "msvd/captioning": functools.partial(msvd.read_captions, task="captioning"),
    "msvd/retrieval": functools.partial(msvd.read_captions, task="retrieval"),
    "msvd/qa": msvd.read_qa,
    "lsmdc/retrieval": lsmdc.read_retrieval,
    "didemo/retrieval": didemo.read_retrieval,
}
NAMES = tuple(_READERS)


class VideoSource:
    """A data set's entries by split, and the loader of their clips."""

    def __init__(
        self,
        name: str,
        splits: Mapping[str, Sequence[Entry]],
        skipped: Sequence[Skipped],
        root: str | os.PathLike[str] = "",
        detections=None,
    ):
        self.name, self.splits, self.root = name, dict(splits), os.fspath(root)
        self.detections = detections
        self.skipped = list(skipped)
        self.class_names: tuple[str, ...] = ()
        if detections is not None:
            self.class_names = detections.class_names
            self.skipped += detections.problems
            self.skipped += self.without_detections()

    def without_detections(self) -> list[Skipped]:
        """Entries with a video that the detections do not know; their objects are padding."""
        if self.detections is None:
            return []
        place = str(self.detections.path)
        reason = f"no detections in {place}; its objects are padding"
        bare = {
            e.video_id: None
            for entries in self.splits.values()
            for e in entries
            if self._detected_as(e) is None and os.path.exists(e.video_path)
        }
        return [Undetected(name, reason, place, 0) for name in bare]

    def _detected_as(self, entry: Entry) -> str | None:
        """What the detections call an entry: its id, or its path under the files or a part of them.

        `data.detect` names the path under its --videos, and published ids are file names.
        """
        if self.detections is None:
            return None
        parts = PurePath(os.path.relpath(entry.video_path, self.root)).parts
        ends = ("/".join(parts[i:]) for i in range(len(parts)))
        return next((n for n in (entry.video_id, *ends) if n in self.detections), None)

    def load(self, entry: Entry, frames: int, short_side: int, objects: int) -> records.Clip:
        """Decodes an entry; raises VideoError or UserError with one line."""
        try:
            pictures, info = video.read_frames(
                entry.video_path, frames, entry.start, entry.end, short_side
            )
        except video.VideoError as error:
            raise video.VideoError(f"{entry.video_id}: {error}") from None
        notes: list[str] = []
        detected = self._detected_as(entry)
        if detected is None or self.detections is None:
            boxes = np.zeros((frames, objects, 4), np.float32)
            classes = np.full((frames, objects), -1, np.int32)
            scores = np.zeros((frames, objects), np.float32)
        else:
            boxes, classes, scores, notes = self.detections.objects(detected, info, objects)
        return records.Clip(
            video_id=entry.video_id,
            frames=pictures,
            boxes=boxes,
            classes=classes,
            scores=scores,
            texts=list(entry.texts),
            answers=list(entry.answers),
            notes=notes,
        )


def open_source(
    name: str,
    manual_dir: str | os.PathLike[str],
    *,
    detections: str | os.PathLike[str] | None = None,
    **options,
) -> VideoSource:
    """The data set `name` from the published files under `manual_dir`."""
    if name not in _READERS:
        raise UserError(f"no data set {name!r} with published files; there are {', '.join(NAMES)}")
    if options:
        raise UserError(f"{name}: no option {sorted(options)[0]!r}")
    files, skipped = Files(manual_dir), SkippedRows()
    splits = _READERS[name](files, skipped)
    splits = {split: entries for split, entries in splits.items() if len(entries)}
    if not splits:
        first = f"; the first: {skipped.rows[0]}" if skipped.rows else ""
        raise UserError(f"{name} in {manual_dir}: no usable entry{first}")
    found = None
    if detections is not None:
        from stoa_jax.data.detections import open_detections

        found = open_detections(detections)
    return VideoSource(name, splits, skipped.rows, manual_dir, found)
