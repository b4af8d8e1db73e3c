"""Transcode videos that browsers cannot play to H.264 in MP4, on demand, in a bounded cache."""

import functools
import hashlib
import os
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
from av.error import FFmpegError

from stoa_jax.data.video.container import VideoError, opened
from stoa_jax.data.video.frames import display_matrix, fit, frame_aspect, upright

SHORT_SIDE = 480  # pixels
MAX_SECONDS = (
    1800.0  # longest video that is transcoded; longer ones must be converted by their owner
)
TIME_LIMIT = 600.0  # seconds for one video
CACHE_BYTES = 2 << 30
CLOCK = Fraction(1, 90_000)
SOUND_RATE = 48_000

_PLAYABLE = {
    # container -> its media type, and the codecs that browsers play in it
    "mp4": ("video/mp4", {"h264", "av1", "vp9"}),
    "webm": ("video/webm", {"vp8", "vp9", "av1"}),
}
_PIXELS = {"yuv420p", "yuvj420p"}


@functools.lru_cache(maxsize=4096)
def _playable(path: str, *_key: int) -> str | None:
    with opened(path, 30.0) as (container, stream):
        names = container.format.name.split(",")
        codec, pixels = stream.codec_context.codec.canonical_name, stream.codec_context.pix_fmt
        sounds = {s.codec_context.codec.canonical_name for s in container.streams.audio}
    suffix = Path(path).suffix.lower()
    if "mp4" in names and suffix != ".mov" and sounds <= {"aac", "mp3", "opus"}:
        kind = "mp4"
    elif "webm" in names and suffix == ".webm":
        kind = "webm"
    else:
        return None
    media_type, codecs = _PLAYABLE[kind]
    return media_type if codec in codecs and pixels in _PIXELS else None


def playable_type(path: Path, key: tuple[int, ...]) -> str | None:
    """Return the media type of a file that browsers play, or None if it must be transcoded.

    `key` changes with the content. A file that is not a video raises `VideoError`.
    """
    return _playable(str(path), *key)


class Cache:
    """Transcoded videos in a directory of at most `limit` bytes, by least recent use."""

    def __init__(self, directory: Path, limit: int = CACHE_BYTES):
        self.directory, self.limit = directory, limit
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()
        self._working = threading.Semaphore(1)  # one at a time, because each takes a whole core
        for part in directory.glob("*.part"):  # left by a killed server
            part.unlink(missing_ok=True)

    def get(self, path: Path, key: tuple[str | int, ...]) -> Path:
        """Return the transcoded form of a file, creating it if necessary."""
        name = hashlib.sha256(repr(key).encode("utf-8", "surrogatepass")).hexdigest()[:32]
        with self._guard:
            lock = self._locks.setdefault(name, threading.Lock())
        target = self.directory / f"{name}.mp4"
        with lock:
            if target.exists():
                os.utime(target)  # mark as recently used
                return target
            part = target.with_suffix(".part")
            try:
                with self._working:
                    transcode(path, part)
                os.replace(part, target)
            except OSError as error:
                reason = error.strerror or str(error)
                raise VideoError(f"{path.name}: could not be transcoded ({reason})") from None
            finally:
                part.unlink(missing_ok=True)
            self._evict(target)
        return target

    def _evict(self, newest: Path) -> None:
        with self._guard:
            files = [(p, p.stat()) for p in self.directory.glob("*.mp4")]
            total = sum(status.st_size for _, status in files)
            for path, status in sorted(files, key=lambda pair: pair[1].st_mtime_ns):
                if total <= self.limit:
                    break
                if path != newest:
                    path.unlink(missing_ok=True)  # processes that are reading the file keep it open
                    total -= status.st_size


def transcode(path: Path, out: Path) -> None:
    """Write a video as H.264 and AAC in MP4, upright, its short side at most `SHORT_SIDE`."""
    deadline = time.monotonic() + TIME_LIMIT
    with opened(path, 60.0) as (source, stream):
        # Put the index first, so that browsers can start and seek before everything has arrived.
        sink = av.open(str(out), "w", format="mp4", options={"movflags": "+faststart"})
        with sink:
            writer = _Writer(path, source, stream, sink)
            for packet in source.demux([stream, *writer.sounds]):
                if time.monotonic() > deadline:
                    raise VideoError(
                        f"{path.name}: transcoding took longer than {TIME_LIMIT:.0f} s; convert "
                        "it once: ffmpeg -i FILE FILE.mp4"
                    )
                try:
                    frames = packet.decode()
                except FFmpegError:
                    continue  # a damaged packet
                for frame in frames:
                    if isinstance(frame, av.VideoFrame | av.AudioFrame):  # skips subtitles
                        writer.write(frame)
            writer.finish()


class _Writer:
    """Encoder of decoded frames, with times that begin at 0 and increase."""

    def __init__(self, path: Path, source, stream, sink):
        self.path, self.stream, self.sink = path, stream, sink
        self.start = float((stream.start_time or 0) * stream.time_base)
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        self.step = 1 / float(rate)
        options = {"preset": "veryfast", "crf": "26"}
        self.video = sink.add_stream("libx264", rate=min(rate, Fraction(60)), options=options)
        self.video.pix_fmt = "yuv420p"
        self.video.codec_context.time_base = CLOCK
        self.sounds = list(source.streams.audio[:1])
        if self.sounds:
            self.audio = sink.add_stream("aac", rate=SOUND_RATE)
            self.resampler = av.AudioResampler("fltp", "stereo", SOUND_RATE)
        self.shown = -1  # of the last frame, in ticks
        self.heard = 0  # audio samples so far
        self.early: list[
            av.AudioFrame
        ] = []  # audio waits for the first frame, which determines the size

    def write(self, frame: av.VideoFrame | av.AudioFrame) -> None:
        seconds = None if frame.time is None else frame.time - self.start
        if seconds is not None and seconds > MAX_SECONDS:
            raise VideoError(
                f"{self.path.name}: longer than {MAX_SECONDS / 60:.0f} minutes and in a format "
                "that browsers cannot play; convert it once: ffmpeg -i FILE FILE.mp4"
            )
        if isinstance(frame, av.VideoFrame):
            self._show(frame, seconds)
        elif isinstance(frame, av.AudioFrame) and (seconds is None or seconds >= 0):
            for part in self.resampler.resample(frame):
                self._sound(part)

    def _show(self, frame: av.VideoFrame, seconds: float | None) -> None:
        # AVI and raw streams have no time for each frame.
        ticks = self.shown + self.step / CLOCK if seconds is None else seconds / CLOCK
        ticks = max(round(ticks), self.shown + 1, 0)
        if self.shown < 0:
            aspect = frame_aspect(self.stream, frame.width, frame.height)
            size = fit((max(1, round(frame.width * aspect)), frame.height), SHORT_SIDE)
            # H.264 requires even sizes.
            self.size = (max(2, size[0] // 2 * 2), max(2, size[1] // 2 * 2))
        pixels = frame.reformat(*self.size, format="rgb24").to_ndarray()
        picture = av.VideoFrame.from_ndarray(upright(pixels, display_matrix(frame)), "rgb24")
        if self.shown < 0:
            self.video.width, self.video.height = picture.width, picture.height
        if (picture.width, picture.height) != (self.video.width, self.video.height):
            picture = picture.reformat(self.video.width, self.video.height)
        picture.pts, picture.time_base = ticks, CLOCK
        self.shown = ticks
        self.sink.mux(self.video.encode(picture))

    def _sound(self, part: av.AudioFrame) -> None:
        if part.pts is not None and part.time_base:
            at = round((float(part.pts * part.time_base) - self.start) * SOUND_RATE)
            self.heard = max(self.heard, at)
        part.pts, part.time_base = self.heard, Fraction(1, SOUND_RATE)
        self.heard += part.samples
        self.early.append(part)
        if self.shown >= 0:
            self._flush_sound()

    def _flush_sound(self) -> None:
        for part in self.early:
            self.sink.mux(self.audio.encode(part))
        self.early.clear()

    def finish(self) -> None:
        if self.shown < 0:
            raise VideoError(f"{self.path.name}: none of its frames can be decoded")
        self.sink.mux(self.video.encode())
        if self.sounds:
            for part in self.resampler.resample(None):
                self._sound(part)
            self._flush_sound()
            self.sink.mux(self.audio.encode())
