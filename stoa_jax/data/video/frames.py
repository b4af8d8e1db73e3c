"""Uniformly spaced frames of a video file, by time, for any container and codec.

`timeline` chooses the frames and whether to seek to the keyframe before each or to decode from the
start; this module decodes them, turns them upright and downscales them. Any fault of a file ends in
one `VideoError`, within `timeout` seconds.
"""

import bisect
import dataclasses
import os
import time
from collections.abc import Iterator, Sequence

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import Interpolation

from stoa_jax.data.video import timeline
from stoa_jax.data.video.container import MAX_PIXELS, VideoError, opened, packets
from stoa_jax.data.video.timeline import Timeline


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """Properties of a video that are known without decoding it."""

    width: int  # as stored, before rotation
    height: int
    frames: int
    duration: float  # seconds from the first frame to the end of the last
    codec: str
    keyframes: int


@dataclasses.dataclass(frozen=True)
class ReadInfo:
    """How frames were read; `times` are seconds from the first frame of the video."""

    video: VideoInfo
    times: tuple[float, ...]
    indices: tuple[int, ...]  # of the frames in presentation order
    width: int  # of an upright frame before downscaling, as detectors saw it
    height: int
    seeks: int  # 0: decoded from the start
    damaged: int  # packets that did not decode


def read_frames(
    path: str | os.PathLike[str],
    num: int = 12,
    start: float | None = None,
    end: float | None = None,
    short_side: int | None = 256,
    *,
    timeout: float = 120.0,
) -> tuple[list[np.ndarray], ReadInfo]:
    """Read `num` frames uint8 RGB [H, W, 3] at the middles of `num` equal parts of [start, end].

    Frames are upright (the file's rotation and mirroring are applied) and of one size, downscaled
    by area to a short side of `short_side` pixels and never enlarged. A clip with fewer frames
    repeats them.
    """
    if num < 1:
        raise VideoError(f"{path}: {num} frames were requested; at least 1 is needed")
    deadline = time.monotonic() + timeout
    with opened(path, timeout) as (container, stream):
        table = timeline.scan(container, stream, path, deadline)
        wanted = timeline.choose(table, num, start, end, path)
        about = _info(stream, table)
    reader = _Reader(path, table, deadline, short_side)
    pictures, seeks = _read(path, reader, wanted, timeout)
    shown = [bisect.bisect_right(table.pts, ticks) - 1 for ticks in wanted]
    info = ReadInfo(
        video=about,
        times=tuple((table.pts[i] - table.pts[0]) * table.tick for i in shown),
        indices=tuple(shown),
        width=reader.shown_size[0],
        height=reader.shown_size[1],
        seeks=seeks,
        damaged=reader.damaged,
    )
    return pictures, info


def probe(path: str | os.PathLike[str], *, timeout: float = 60.0) -> VideoInfo:
    """Return size, length and codec; reads the packets but decodes no frame."""
    with opened(path, timeout) as (container, stream):
        table = timeline.scan(container, stream, path, time.monotonic() + timeout)
        return _info(stream, table)


def _info(stream, table: Timeline) -> VideoInfo:
    context = stream.codec_context
    return VideoInfo(
        width=context.width,
        height=context.height,
        frames=len(table.pts),
        duration=(table.end - table.pts[0]) * table.tick,
        codec=context.name,
        keyframes=len(table.keys),
    )


def _read(path, reader: "_Reader", wanted: list[int], timeout: float):
    """Read the wanted frames, by seeking if that costs less than decoding from the start."""
    plan = timeline.jumps(reader.table, wanted)
    if plan:
        try:
            with opened(path, timeout) as (container, stream):
                pictures = {}
                for key, ticks in plan:
                    container.seek(key, stream=stream)
                    pictures |= reader.take(container, stream, ticks, key)
            return [pictures[t] for t in wanted], len(plan)
        except (_Astray, FFmpegError):
            pass  # the index is wrong, or the container seeks inexactly: read from the start
    # Reopen the file: returning to the start would be a seek too.
    with opened(path, timeout) as (container, stream):
        try:
            pictures = reader.take(container, stream, sorted(set(wanted)))
        except _Astray as error:
            raise VideoError(f"{path}: {error}") from None
    return [pictures[t] for t in wanted], 0


class _Astray(Exception):
    """The decoded frames are not the requested ones."""


class _Reader:
    """Decoder that moves forward and keeps the frames at given ticks."""

    def __init__(self, path, table: Timeline, deadline: float, short_side: int | None):
        self.path, self.table = path, table
        self.deadline, self.short_side = deadline, short_side
        self.damaged = 0
        self.shown_size = (0, 0)
        self._size: tuple[int, int] | None = None

    def take(self, container, stream, wanted: Sequence[int], key: int | None = None):
        """Return {ticks: frame} for sorted ticks, from the container's current position.

        A missing frame is replaced by the one shown before it. After a seek to the keyframe `key`,
        any surprise raises `_Astray`; without one, only the lack of any frame is an error.
        """
        pictures: dict[int, np.ndarray] = {}
        queue = list(wanted)
        held = None  # the last frame, still shown at the next wanted tick
        for frame, ticks in self._frames(container, stream, key):
            while queue and ticks > queue[0]:
                if key is not None:
                    raise _Astray("a frame is not at the time of its packet")
                pictures[queue.pop(0)] = self._picture(held or frame, stream)
            if queue and ticks == queue[0]:
                pictures[queue.pop(0)] = self._picture(frame, stream)
            if not queue:
                return pictures
            held = frame
        if held is None:
            raise _Astray("none of its frames can be decoded")
        if key is not None:
            raise _Astray("frames are missing at the end")
        for ticks in queue:
            pictures[ticks] = self._picture(held, stream)
        return pictures

    def _frames(self, container, stream, key: int | None) -> Iterator[tuple[av.VideoFrame, int]]:
        count, first = 0, True
        for packet in packets(container, [stream], self.path, self.deadline):
            if first and key is not None and (not packet.is_keyframe or packet.pts != key):
                raise _Astray("the seek went elsewhere")
            first = False
            try:
                frames = packet.decode()
            except (FFmpegError, ValueError):
                self.damaged += 1
                continue
            for frame in frames:
                if self.table.exact and frame.pts is not None:
                    yield frame, frame.pts
                else:  # by rank, as the table's times were assigned
                    yield frame, self.table.pts[min(count, len(self.table.pts) - 1)]
                count += 1

    def _picture(self, frame: av.VideoFrame, stream) -> np.ndarray:
        width, height = frame.width, frame.height
        matrix = display_matrix(frame)
        if self._size is None:
            aspect = frame_aspect(stream, width, height)
            self._size = fit((max(1, round(width * aspect)), height), self.short_side)
            self.shown_size = (height, width) if turned(matrix) else (width, height)
        out = frame.reformat(
            width=self._size[0],
            height=self._size[1],
            format="rgb24",
            interpolation=Interpolation.AREA,
        ).to_ndarray()
        return upright(out, matrix)


def frame_aspect(stream, width: int, height: int) -> float:
    """Return the width of a pixel over its height; 1 if the file gives none or nonsense."""
    aspect = stream.sample_aspect_ratio
    if not aspect or not 0.25 <= aspect <= 4:
        return 1.0
    # Keep the number of pixels close to what is stored.
    return float(aspect) if width * height * aspect <= MAX_PIXELS else 1.0


def fit(size: tuple[int, int], short_side: int | None) -> tuple[int, int]:
    """Return (width, height) scaled down to a short side of at most `short_side`."""
    short = min(size)
    if not short_side or short <= short_side:
        return size
    width, height = (max(1, round(s * short_side / short)) for s in size)
    return width, height


def display_matrix(frame: av.VideoFrame) -> np.ndarray | None:
    """Return the matrix [3, 3] that turns or mirrors a frame, or None for an upright one."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return None
    values = np.frombuffer(bytes(data), np.int32)
    return values.reshape(3, 3) if values.size == 9 else None


def turned(matrix: np.ndarray | None) -> bool:
    """Return whether a display matrix swaps width and height."""
    if matrix is None:
        return False
    a, b, c, d = np.abs(matrix[:2, :2].astype(np.int64)).ravel()
    return bool(b + c > a + d)


def upright(picture: np.ndarray, matrix: np.ndarray | None) -> np.ndarray:
    """Apply a display matrix [3, 3] to a frame: quarter turns and mirroring.

    A point moves as [x y] @ matrix[:2, :2]; other angles are rounded to the nearest quarter turn.
    """
    if matrix is None:
        return picture
    (a, b), (c, d) = matrix[:2, :2].tolist()
    flip_x, flip_y = a < 0, d < 0
    if turned(matrix):
        picture = picture.transpose(1, 0, 2)
        flip_x, flip_y = c < 0, b < 0
    picture = picture[::-1] if flip_y else picture
    picture = picture[:, ::-1] if flip_x else picture
    return np.ascontiguousarray(picture)
