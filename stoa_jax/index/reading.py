"""Named sources from videos in every form, their windows, and the pixels of a window.

`plan` and `read` run in decoder processes, so nothing here imports jax.
"""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stoa_jax.errors import UserError
from stoa_jax.index import windows
from stoa_jax.index.windows import Window

if TYPE_CHECKING:
    from stoa_jax.inference.videos import Clip, Detected, Frames, Prepared, Preprocessing, Video


@dataclasses.dataclass(frozen=True)
class Source:
    """One video to index: a file, its bytes, or frames."""

    id: str
    video: "str | bytes | Frames"
    start: float | None = None
    end: float | None = None
    detections: "Detected" = None

    @property
    def path(self) -> str | None:
        """Path of the file; None for bytes and frames."""
        return os.path.abspath(self.video) if isinstance(self.video, str) else None

    @property
    def has_clock(self) -> bool:
        """Whether it can be cut into windows; frames are one segment without times."""
        return isinstance(self.video, str | bytes)


def sources(videos: "Sequence[Video | Clip]", ids: Sequence[str] | None) -> list[Source]:
    """Return videos with their ids: as given, or the path, or a hash of the content."""
    if isinstance(videos, str | bytes | os.PathLike):
        raise UserError("add takes a list of videos; put the single video in a list")
    if isinstance(videos, np.ndarray) and videos.ndim == 4:
        raise UserError("add takes a list of videos; put the single array in a list")
    videos = list(videos)
    if ids is not None:
        if isinstance(ids, str):
            raise UserError("add takes a list of ids; put the single id in a list")
        ids = list(ids)
        if len(ids) != len(videos):
            raise UserError(f"add: {len(videos)} videos and {len(ids)} ids; give one id for each")
        for position, identity in enumerate(ids):
            if not isinstance(identity, str):
                raise UserError(f"ids[{position}]: {identity!r} is not a string")
    found = [_source(v, None if ids is None else ids[i]) for i, v in enumerate(videos)]
    seen: dict[str, int] = {}
    for position, source in enumerate(found):
        other = seen.setdefault(source.id, position)
        if other != position:
            raise UserError(
                f"add: videos {other} and {position} have the same id {source.id!r}; give each "
                "video once, or pass distinct ids"
            )
    return found


def _source(video: "Video | Clip", identity: str | None) -> Source:
    from stoa_jax.inference.videos import Clip

    clip = video if isinstance(video, Clip) else Clip(video)
    content = clip.video
    if isinstance(content, os.PathLike):
        content = os.fspath(content)
    if isinstance(content, bytearray | memoryview):
        content = bytes(content)
    if identity is None:
        identity = content if isinstance(content, str) else _hash(content)
        if clip.start is not None or clip.end is not None:
            first, last = ("" if t is None else f"{t:g}" for t in (clip.start, clip.end))
            identity += f"#t={first},{last}"
    return Source(identity, content, clip.start, clip.end, clip.detections)


def _hash(content: "bytes | Frames") -> str:
    digest = hashlib.sha256()
    if isinstance(content, bytes):
        digest.update(content)
    else:
        for frame in content:
            frame = np.ascontiguousarray(frame)
            digest.update(f"{frame.dtype} {frame.shape}".encode())
            digest.update(frame.data)
    return f"sha256:{digest.hexdigest()}"


def plan(path: str, source: Source, segment: float | str, stride: float) -> list[Window]:
    """Return the windows of a video file."""
    from stoa_jax.data.video import probe

    duration = probe(path).duration
    start = source.start or 0.0
    end = duration if source.end is None else min(source.end, duration)
    if not 0 <= start < end:
        raise UserError(
            f"start={source.start}, end={source.end} is not within a video of {duration:.2f} s"
        )
    if segment == windows.SCENE:
        return windows.shots(Path(path), start, end)
    return windows.cut(start, end, float(segment), stride)


def read(
    video: "Video",
    window: Window | None,
    detections: "Detected",
    how: "tuple[Preprocessing, ...]",
) -> "tuple[Prepared, ...]":
    """Return one window of a video, prepared in each of the requested ways."""
    from stoa_jax.inference.videos import Clip, prepare

    start, end = window or (None, None)
    return tuple(
        prepare(Clip(video, start, end, detections if way.objects else None), way) for way in how
    )
