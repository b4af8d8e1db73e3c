"""Uniformly spaced frames of a video file, by time, whatever the container and codec.

One pass over the packets (no decoding) tells when each frame is shown and where the keyframes
stand. From that the frames to take are chosen, and how: jumping to the keyframe before each, or
decoding straight through where that costs less. Every way a file can be bad ends in one
`VideoError`, within `timeout` seconds.
"""

import bisect
import dataclasses
import functools
import itertools
import math
import os
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation

from stoa_jax.errors import UserError

MAX_PACKETS = 4_000_000  # 18 hours at 60 frames a second
MAX_TORN = 20  # damaged places that reading goes on after
MAX_PIXELS = 2**27  # 16k x 8k; a header may claim 65535 x 65535 and ask for 16 GB
SEEK_COST = 4  # a jump costs about as much as decoding so many frames
# Share of the time that may be missing at the end before a file counts as truncated.
SLACK_SECONDS, SLACK_SHARE = 1.0, 0.1

# Playlists and the like, which open other files, and text shown as pictures.
_NO_VIDEO_FORMATS = frozenset(
    "hls applehttp dash concat concatf sdp rtsp rtp sap imf image2 lavfi tty ffmetadata".split()
)
# Containers whose header tells the duration; elsewhere it is guessed from the bit rate.
_HEADED_FORMATS = frozenset("mov matroska avi asf flv".split())


class VideoError(UserError):
    """A video that cannot be read: one line with its path and the reason."""


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What is known of a video without decoding it."""

    width: int  # as stored, before rotation
    height: int
    frames: int
    duration: float  # seconds from the first frame to the end of the last
    codec: str
    keyframes: int


@dataclasses.dataclass(frozen=True)
class ReadInfo:
    """How frames were read: `times` are seconds from the first frame of the video."""

    video: VideoInfo
    times: tuple[float, ...]
    indices: tuple[int, ...]  # of the frames, in the order of showing
    width: int  # pixels of an upright frame before it was made smaller: what detectors saw
    height: int
    seeks: int  # 0: decoded straight through
    damaged: int  # packets that did not decode


@dataclasses.dataclass(frozen=True)
class _Table:
    """When frames are shown, in ticks of the stream's clock."""

    pts: list[int]  # sorted
    keys: list[int]  # sorted; those of keyframes
    end: int
    exact: bool  # pts are the stream's own; else guessed from the decoding order
    tick: float  # seconds


def read_frames(
    path: str | os.PathLike[str],
    num: int = 12,
    start: float | None = None,
    end: float | None = None,
    short_side: int | None = 256,
    *,
    timeout: float = 120.0,
) -> tuple[list[np.ndarray], ReadInfo]:
    """`num` frames uint8 RGB [H, W, 3]: the middles of `num` equal parts of [start, end].

    Upright (rotation and mirroring of the file honoured), all of one size, made smaller by area
    to `short_side` pixels and never larger. A clip with fewer frames repeats them.
    """
    if num < 1:
        raise VideoError(f"{path}: {num} frames asked for; at least 1")
    deadline = time.monotonic() + timeout
    with _opened(path, timeout) as (container, stream):
        table = _scan(container, stream, path, deadline)
        wanted = _choose(table, num, start, end, path)
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
    """Size, length and codec; reads the packets but decodes no frame."""
    with _opened(path, timeout) as (container, stream):
        table = _scan(container, stream, path, time.monotonic() + timeout)
        return _info(stream, table)


def _info(stream, table: _Table) -> VideoInfo:
    context = stream.codec_context
    return VideoInfo(
        width=context.width,
        height=context.height,
        frames=len(table.pts),
        duration=(table.end - table.pts[0]) * table.tick,
        codec=context.name,
        keyframes=len(table.keys),
    )


@functools.cache
def _formats() -> str:
    return ",".join(sorted(av.formats_available - _NO_VIDEO_FORMATS))


class _opened:
    """The container and its video stream; every failure inside becomes a VideoError."""

    def __init__(self, path, timeout: float):
        self.path, self.timeout = path, timeout

    def __enter__(self):
        path = Path(self.path)
        try:
            status = path.stat()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise VideoError(f"{path}: {reason}") from None
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise VideoError(f"{path}: not a regular file")
        if status.st_size == 0:
            raise VideoError(f"{path}: empty file")
        try:
            self.container = av.open(
                str(path.absolute()),  # absolute: no name is taken for a protocol ("concat:…")
                options={"max_pixels": str(MAX_PIXELS)},
                container_options={"protocol_whitelist": "file", "format_whitelist": _formats()},
                metadata_errors="replace",
                timeout=self.timeout,
            )
        except (av.FFmpegError, ValueError, RuntimeError, OSError) as error:
            raise VideoError(f"{path}: not a video ({_reason(error)})") from None
        try:
            stream = _video_stream(self.container, path)
        except BaseException:
            self.container.close()
            raise
        return self.container, stream

    def __exit__(self, kind, error, trace):
        self.container.close()
        if isinstance(error, VideoError) or not isinstance(
            error, (av.FFmpegError, ValueError, RuntimeError, OSError, OverflowError, MemoryError)
        ):
            return False
        raise VideoError(f"{self.path}: does not decode ({_reason(error)})") from None


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


def _video_stream(container, path):
    cover = av.stream.Disposition.attached_pic  # the cover of a sound file is no video
    streams = [s for s in container.streams.video if not s.disposition & cover]
    if not streams:
        kind = "only sound" if container.streams.audio else "no video"
        raise VideoError(f"{path}: {kind} in it")
    stream = streams[0]
    context = stream.codec_context
    if context is None:
        raise VideoError(f"{path}: no decoder for its codec")
    if not stream.time_base:
        raise VideoError(f"{path}: its video stream has no clock")
    if context.width * context.height > MAX_PIXELS:
        raise VideoError(
            f"{path}: {context.width}x{context.height} pixels; at most {MAX_PIXELS} are read"
        )
    # One thread: clips are read in parallel processes, and frames come the same every time.
    context.thread_count = 1
    context.options = {"max_pixels": str(MAX_PIXELS)}
    return stream


def _packets(container, streams, path, deadline: float) -> Iterator[av.Packet]:
    """Packets to the end of what can be read, bounded in number and time."""
    packets, torn = container.demux(streams), 0
    for count in itertools.count():
        if count > MAX_PACKETS:
            raise VideoError(f"{path}: more than {MAX_PACKETS} packets")
        if time.monotonic() > deadline:
            raise VideoError(f"{path}: reading took too long; gave up")
        try:
            packet = next(packets, None)
        except av.FFmpegError as error:
            torn += 1
            if torn > MAX_TORN or isinstance(error, av.error.EOFError | av.error.ExitError):
                return  # what came before may do, and `_scan` says whether
            packets = container.demux(streams)  # goes on after a damaged place, if it can
            continue
        if packet is None:
            return
        yield packet


def _scan(container, stream, path, deadline: float) -> _Table:
    """The table of frame times; refuses a file that ends long before it says it does."""
    tick = float(stream.time_base)
    pts, dts, keys, lengths = [], [], [], []
    furthest = None  # seconds, over all streams: sound may go on after the pictures
    # The packets of a sound stream tell of a truncated file too, but not those of data streams.
    streams = [stream, *container.streams.audio]
    for packet in _packets(container, streams, path, deadline):
        if packet.size == 0 and packet.pts is None and packet.dts is None:
            continue  # the flush at the end
        at = packet.pts if packet.pts is not None else packet.dts
        if at is not None and packet.time_base:
            seconds = float((at + (packet.duration or 0)) * packet.time_base)
            furthest = seconds if furthest is None else max(furthest, seconds)
        if packet.stream_index != stream.index or packet.is_discard or packet.size == 0:
            continue
        pts.append(packet.pts)
        dts.append(packet.dts)
        lengths.append(packet.duration or 0)
        if packet.is_keyframe and packet.pts is not None:
            keys.append(packet.pts)
    if not pts:
        raise VideoError(f"{path}: no frame in it")
    exact = None not in pts and len(set(pts)) == len(pts)
    times = sorted(pts) if exact else _guessed(dts, stream)
    step = max(1, (times[-1] - times[0]) // max(1, len(times) - 1)) if len(times) > 1 else 1
    last = lengths[pts.index(times[-1])] if exact else lengths[-1]
    table = _Table(times, sorted(keys), times[-1] + (last or step), exact, tick)
    if furthest is not None:
        _refuse_truncated(container, furthest, path)
    return table


def _guessed(dts: Sequence[int | None], stream) -> list[int]:
    """Frame times where packets carry none: the decoding times in order, or the frame rate."""
    if None not in dts and len(set(dts)) == len(dts):
        return sorted(dts)
    rate = stream.average_rate or stream.guessed_rate or 25
    step = max(1, round(1 / (float(rate) * float(stream.time_base))))
    return [i * step for i in range(len(dts))]


def _refuse_truncated(container, furthest: float, path) -> None:
    names = set(container.format.name.split(","))
    if container.duration is None or not names & _HEADED_FORMATS:
        return
    told = container.duration / av.time_base
    found = furthest - (container.start_time or 0) / av.time_base
    if found < told * (1 - SLACK_SHARE) - SLACK_SECONDS:
        raise VideoError(f"{path}: truncated: {found:.1f} s of {told:.1f} s can be read")


def _choose(table: _Table, num: int, start, end, path) -> list[int]:
    """The ticks of the frames shown at the middles of `num` parts; repeats on short clips."""
    length = (table.end - table.pts[0]) * table.tick
    first = 0.0 if start is None else float(start)
    last = length if end is None else min(float(end), length)
    if not (math.isfinite(first) and (end is None or float(end) > first)) or first < 0:
        raise VideoError(f"{path}: no time from {start} to {end} s")
    if first >= length:
        raise VideoError(f"{path}: starts at {first:g} s, but the video ends at {length:.2f} s")
    chosen = []
    for i in range(num):
        at = first + (i + 0.5) * (last - first) / num
        ticks = table.pts[0] + at / table.tick
        chosen.append(table.pts[max(0, bisect.bisect_right(table.pts, ticks) - 1)])
    return chosen


def _read(path, reader: "_Reader", wanted: list[int], timeout: float):
    """The wanted pictures, by jumps where they cost less than decoding straight through."""
    plan = _jumps(reader.table, wanted)
    if plan:
        try:
            with _opened(path, timeout) as (container, stream):
                pictures = {}
                for key, ticks in plan:
                    container.seek(key, stream=stream)
                    pictures |= reader.take(container, stream, ticks, key)
            return [pictures[t] for t in wanted], len(plan)
        except (_Astray, av.FFmpegError):
            pass  # the index lies, or the container seeks about: read from the start
    # Opened anew: to go back to the start is a seek too.
    with _opened(path, timeout) as (container, stream):
        try:
            pictures = reader.take(container, stream, sorted(set(wanted)))
        except _Astray as error:
            raise VideoError(f"{path}: {error}") from None
    return [pictures[t] for t in wanted], 0


def _jumps(table: _Table, wanted: Sequence[int]) -> list[tuple[int, list[int]]]:
    """(keyframe, frames after it) to jump to; none where decoding straight through is cheaper."""
    if not table.exact or not table.keys:
        return []
    plan: dict[int, list[int]] = {}
    for ticks in sorted(set(wanted)):
        place = bisect.bisect_right(table.keys, ticks) - 1
        if place < 0:
            return []
        plan.setdefault(table.keys[place], []).append(ticks)

    def index(ticks: int) -> int:
        return bisect.bisect_left(table.pts, ticks)

    by_jumps = sum(SEEK_COST + index(t[-1]) - index(key) + 1 for key, t in plan.items())
    return list(plan.items()) if by_jumps < index(max(wanted)) + 1 else []


class _Astray(Exception):
    """The frames that came are not the ones asked for."""


class _Reader:
    """Decodes forward and keeps the pictures at given ticks."""

    def __init__(self, path, table: _Table, deadline: float, short_side: int | None):
        self.path, self.table = path, table
        self.deadline, self.short_side = deadline, short_side
        self.damaged = 0
        self.shown_size = (0, 0)
        self._size: tuple[int, int] | None = None

    def take(self, container, stream, wanted: Sequence[int], key: int | None = None):
        """{ticks: picture} of sorted ticks, from where the container stands.

        A frame that is missing is replaced by the one shown before it. After a jump to the
        keyframe `key`, anything unexpected raises `_Astray`; else only that no frame comes.
        """
        pictures: dict[int, np.ndarray] = {}
        queue = list(wanted)
        held = None  # the last frame, still shown at the next wanted ticks
        for frame, ticks in self._frames(container, stream, key):
            while queue and ticks > queue[0]:
                if key is not None:
                    raise _Astray("a frame is not where the packets told")
                pictures[queue.pop(0)] = self._picture(held or frame, stream)
            if queue and ticks == queue[0]:
                pictures[queue.pop(0)] = self._picture(frame, stream)
            if not queue:
                return pictures
            held = frame
        if held is None:
            raise _Astray("none of its frames decodes")
        if key is not None:
            raise _Astray("frames are missing at the end")
        for ticks in queue:
            pictures[ticks] = self._picture(held, stream)
        return pictures

    def _frames(self, container, stream, key: int | None) -> Iterator[tuple[av.VideoFrame, int]]:
        count, first = 0, True
        for packet in _packets(container, [stream], self.path, self.deadline):
            if first and key is not None and (not packet.is_keyframe or packet.pts != key):
                raise _Astray("the seek went elsewhere")
            first = False
            try:
                frames = packet.decode()
            except (av.FFmpegError, ValueError):
                self.damaged += 1
                continue
            for frame in frames:
                if self.table.exact and frame.pts is not None:
                    yield frame, frame.pts
                else:  # by its place, as the table's times were
                    yield frame, self.table.pts[min(count, len(self.table.pts) - 1)]
                count += 1

    def _picture(self, frame: av.VideoFrame, stream) -> np.ndarray:
        width, height = frame.width, frame.height
        matrix = _matrix(frame)
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
    """Width of a pixel over its height; 1 where the file says nothing or nonsense."""
    aspect = stream.sample_aspect_ratio
    if not aspect or not 0.25 <= aspect <= 4:
        return 1.0
    # Never more pixels than are stored, by much.
    return float(aspect) if width * height * aspect <= MAX_PIXELS else 1.0


def fit(size: tuple[int, int], short_side: int | None) -> tuple[int, int]:
    """(width, height) with the shorter at most `short_side`, in proportion."""
    short = min(size)
    if not short_side or short <= short_side:
        return size
    width, height = (max(1, round(s * short_side / short)) for s in size)
    return width, height


def _matrix(frame: av.VideoFrame) -> np.ndarray | None:
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return None
    values = np.frombuffer(bytes(data), np.int32)
    return values.reshape(3, 3) if values.size == 9 else None


def turned(matrix: np.ndarray | None) -> bool:
    """Whether a display matrix swaps width and height."""
    if matrix is None:
        return False
    a, b, c, d = np.abs(matrix[:2, :2].astype(np.int64)).ravel()
    return bool(b + c > a + d)


def upright(picture: np.ndarray, matrix: np.ndarray | None) -> np.ndarray:
    """The picture as shown by a display matrix [3, 3]: turned by quarters and mirrored.

    A point moves as [x y] @ matrix[:2, :2]; other angles go to the nearest quarter.
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
