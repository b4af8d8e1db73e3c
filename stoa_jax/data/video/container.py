"""Open a video file and read its packets; any fault of the file ends in one `VideoError`.

Only regular files are opened, and no format that opens other files. Pixels, packets, damaged
packets and time are bounded.
"""

import functools
import itertools
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import av
import av.error
from av.error import FFmpegError
from av.stream import Disposition

from stoa_jax.errors import UserError

MAX_PACKETS = 4_000_000  # 18 hours at 60 frames per second
MAX_TORN = 20  # reading continues after at most this many damaged packets
MAX_PIXELS = 2**27  # 16k x 8k; a header may claim 65535 x 65535 and ask for 16 GB

# Playlists and similar, which open other files, and text rendered as video.
_NO_VIDEO_FORMATS = frozenset(
    "hls applehttp dash concat concatf sdp rtsp rtp sap imf image2 lavfi tty ffmetadata".split()
)


class VideoError(UserError):
    """A video that cannot be read; the message is one line with its path and the reason."""


@functools.cache
def _formats() -> str:
    return ",".join(sorted(av.formats_available - _NO_VIDEO_FORMATS))


class opened:
    """Context of an open container and its video stream; failures inside become a VideoError."""

    def __init__(self, path, timeout: float):
        self.path, self.timeout = path, timeout

    def __enter__(self):
        path = Path(self.path)
        try:
            status = path.stat()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise VideoError(f"{path}: {reason}") from None
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would block
            raise VideoError(f"{path}: not a regular file")
        if status.st_size == 0:
            raise VideoError(f"{path}: empty file")
        try:
            self.container = av.open(
                str(
                    path.absolute()
                ),  # absolute, so that no name is taken for a protocol ("concat:…")
                options={"max_pixels": str(MAX_PIXELS)},
                container_options={"protocol_whitelist": "file", "format_whitelist": _formats()},
                metadata_errors="replace",
                timeout=self.timeout,
            )
        except (FFmpegError, ValueError, RuntimeError, OSError) as error:
            raise VideoError(f"{path}: not a video ({_reason(error)})") from None
        try:
            stream = _video_stream(self.container, path)
        except BaseException:  # `__exit__` is not called if this raises
            self.container.close()
            raise
        return self.container, stream

    def __exit__(self, kind, error, trace):
        self.container.close()
        if isinstance(error, VideoError) or not isinstance(
            error, (FFmpegError, ValueError, RuntimeError, OSError, OverflowError, MemoryError)
        ):
            return False
        raise VideoError(f"{self.path}: does not decode ({_reason(error)})") from None


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


def _video_stream(container, path):
    cover = Disposition.attached_pic  # the cover image of an audio file is not a video
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
            f"{path}: {context.width}x{context.height} pixels; at most {MAX_PIXELS} are supported"
        )
    # One thread: clips are read in parallel processes, and decoding stays deterministic.
    context.thread_count = 1
    context.options = {"max_pixels": str(MAX_PIXELS)}
    return stream


def packets(container, streams, path, deadline: float) -> Iterator[av.Packet]:
    """Yield the packets that can be read, bounded in number and time."""
    coming, torn = container.demux(streams), 0
    for count in itertools.count():
        if count > MAX_PACKETS:
            raise VideoError(f"{path}: more than {MAX_PACKETS} packets")
        if time.monotonic() > deadline:
            raise VideoError(f"{path}: reading took too long; gave up")
        try:
            packet = next(coming, None)
        except FFmpegError as error:
            torn += 1
            if torn > MAX_TORN or isinstance(error, av.error.EOFError | av.error.ExitError):
                return  # `timeline.scan` decides whether the packets so far suffice
            coming = container.demux(streams)  # continues after a damaged packet if possible
            continue
        if packet is None:
            return
        yield packet
