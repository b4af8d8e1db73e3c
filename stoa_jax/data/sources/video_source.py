"""An open data set of video files: entries, their detections, and the loader of their clips."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Protocol

import numpy as np

from stoa_jax.data import records, video
from stoa_jax.data.sources.entries import Entry, Skipped, Undetected


class ClipDetections(Protocol):
    """Detections of the videos of a data set; `stoa_jax.data.detections` opens them."""

    path: Path
    class_names: tuple[str, ...]
    problems: list[Skipped]

    def __contains__(self, name: str, /) -> bool:
        """Whether there are detections of the video `name`."""
        ...

    def objects(
        self, name: str, info: video.ReadInfo, most: int, /
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
        """Return boxes, classes and scores by frame, and notes about what was left out."""
        ...


class VideoSource:
    """A data set's entries by split, and the loader of their clips."""

    def __init__(
        self,
        name: str,
        splits: Mapping[str, Sequence[Entry]],
        skipped: Sequence[Skipped],
        root: str | os.PathLike[str] = "",
        detections: ClipDetections | None = None,
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
        """Return entries whose video exists but has no detections; their objects are padding."""
        if self.detections is None:
            return []
        path = str(self.detections.path)
        reason = f"no detections in {path}; its objects are padding"
        bare = {
            e.video_id: None
            for entries in self.splits.values()
            for e in entries
            if self._detected_as(e) is None and os.path.exists(e.video_path)
        }
        return [Undetected(name, reason, path, 0) for name in bare]

    def _detected_as(self, entry: Entry) -> str | None:
        """Return the name of an entry in the detections: its id, or a trailing part of its path.

        `data.detect` writes paths relative to its --videos, and published ids are file names.
        """
        if self.detections is None:
            return None
        parts = PurePath(os.path.relpath(entry.video_path, self.root)).parts
        ends = ("/".join(parts[i:]) for i in range(len(parts)))
        return next((n for n in (entry.video_id, *ends) if n in self.detections), None)

    def load(self, entry: Entry, frames: int, short_side: int, objects: int) -> records.Clip:
        """Decode an entry, or raise VideoError or UserError with one line."""
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
