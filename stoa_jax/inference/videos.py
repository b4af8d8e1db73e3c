"""Videos in every form that a user may have, prepared as the model reads them.

The code that builds data sets decodes files and bytes: frames at the middles of T equal parts,
upright, at any frame rate. Shapes: T frames, K objects per frame, S side of a frame.
"""

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stoa_jax.data.resize import center_crop, resize_and_crop
from stoa_jax.errors import InputError, UserError
from stoa_jax.inference import detections
from stoa_jax.inference.detections import Detections, Detector

Frames = np.ndarray | Sequence[np.ndarray]
Video = str | os.PathLike[str] | bytes | Frames
Detected = Detections | str | os.PathLike[str] | Detector | None  # arrays, a file, or a detector


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """A video, or the part of it from `start` to `end` seconds, with the objects in it.

    `detections` is arrays, a file of any format that `stoa_jax.data.build` reads, or a detector.

    >>> clip = stoa_jax.Clip("example.mp4", start=1, end=3, detections="example.jsonl")
    >>> model.encode_video([clip]).shape
    (1, 128)
    """

    video: Video
    start: float | None = None
    end: float | None = None
    detections: Detected = None


@dataclasses.dataclass(frozen=True)
class Failure:
    """A video that `on_error="skip"` left out: its index in the call, and the reason."""

    index: int
    error: UserError


class Prepared(NamedTuple):
    """One clip as the model reads it."""

    pixels: np.ndarray  # uint8 [T, S, S, 3]
    boxes: np.ndarray  # float32 [T, K, 4]
    classes: np.ndarray  # int32 [T, K], -1 for padding
    scores: np.ndarray  # float32 [T, K]
    times: np.ndarray  # [T] seconds; frame numbers if the video is an array
    names: tuple[str, ...]  # of the classes
    detected: bool  # whether detections were given
    frames: Sequence[np.ndarray]  # T of uint8 [H, W, 3], before resizing; () unless kept
    crop: np.ndarray  # [4], xyxy: the part of a frame that the model sees, as fractions


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How many frames are sampled from a video, and how they become the model's input."""

    frames: int  # T
    size: int  # S
    objects: int  # K; 0: detections are not read
    exact: bool  # repeat the frames of a shorter array up to T

    @property
    def decode_side(self) -> int:
        """Short side to which video files are decoded, the default of `stoa_jax.data.build`."""
        return max(256, -(-self.size * 8 // 7))


def prepare(video: Video | Clip, how: Preprocessing, *, keep_frames: bool = False) -> Prepared:
    """Decode, sample, crop and resize one video, and map its boxes to the crop."""
    clip = video if isinstance(video, Clip) else Clip(video)
    frames, times, found = _read(clip, how)
    height, width = frames[0].shape[:2]
    pixels = np.stack([resize_and_crop(f, how.size) for f in frames])
    t, k = len(frames), how.objects
    boxes = np.zeros((t, k, 4), np.float32)
    classes = np.full((t, k), -1, np.int32)
    scores = np.zeros((t, k), np.float32)
    names: tuple[str, ...] = ()
    left, top, across, down = crop = center_crop(height, width, how.size)
    if k and found is not None:
        from stoa_jax.data import augment

        names = tuple(found.names)
        moved = augment.crop_boxes(found.boxes, found.classes, height, width, crop, False)
        best = augment.best_objects(*moved, found.scores, k)
        kept = best[0].shape[1]
        boxes[:, :kept], classes[:, :kept], scores[:, :kept] = best
    seen = np.array([left, top, left + across, top + down]) / [width, height, width, height]
    kept_frames = frames if keep_frames else ()
    return Prepared(
        pixels, boxes, classes, scores, times, names, found is not None, kept_frames, seen
    )


def _read(
    clip: Clip, how: Preprocessing
) -> tuple[Sequence[np.ndarray], np.ndarray, Detections | None]:
    """Return the sampled frames, their times, and the objects in them."""
    video = clip.video
    if isinstance(video, bytes | bytearray | memoryview):
        return _read_bytes(clip, bytes(video), how)
    if isinstance(video, str | os.PathLike):
        return _read_file(clip, Path(video), str(video), how)
    frames = _checked_frames(video)
    if clip.start is not None or clip.end is not None:
        raise InputError(
            f"start={clip.start}, end={clip.end} on an array, which has no clock; slice the array"
        )
    indices = np.arange(len(frames))
    if len(frames) > how.frames or (how.exact and len(frames) != how.frames):
        # The middles of equal parts, as for files.
        indices = ((np.arange(how.frames) + 0.5) * len(frames) / how.frames).astype(int)
    sampled = [frames[i] for i in indices.tolist()]
    found = _detections(clip, sampled, how, given=len(frames), indices=indices)
    return sampled, indices.astype(np.float64), found


def _read_bytes(clip: Clip, data: bytes, how: Preprocessing):
    if not data:
        raise InputError("the video is 0 bytes long; pass the whole content of a file")
    # The decoder opens regular files only, so the bytes are written to one.
    with tempfile.NamedTemporaryFile(prefix="stoa-", suffix=".video") as file:
        file.write(data)
        file.flush()
        return _read_file(clip, Path(file.name), f"<{len(data)} bytes>", how)


def _read_file(clip: Clip, path: Path, shown: str, how: Preprocessing):
    from stoa_jax.data.video import VideoError, read_frames

    for name, value in (("start", clip.start), ("end", clip.end)):
        if value is not None and not isinstance(value, int | float | np.number):
            raise InputError(f"{shown}: {name} is {value!r}; it must be a number of seconds")
    try:
        frames, info = read_frames(path, how.frames, clip.start, clip.end, how.decode_side)
    except VideoError as error:
        raise VideoError(str(error).replace(str(path), shown)) from None
    named = path if shown == str(clip.video) else None
    found = _detections(clip, frames, how, given=len(frames), info=info, path=named)
    return frames, np.array(info.times), found


def _checked_frames(video) -> Sequence[np.ndarray]:
    if isinstance(video, np.ndarray):
        if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
            raise InputError(
                f"the video is {video.dtype} {list(video.shape)}; an array is uint8 [T, H, W, 3] "
                "with at least one frame, RGB from 0 to 255"
            )
        return list(video)
    if not isinstance(video, Sequence):
        raise InputError(
            f"the video is a {type(video).__name__}; pass a path, a file's bytes, uint8 "
            "[T, H, W, 3], a list of frames or stoa_jax.Clip"
        )
    if not video:
        raise InputError("the video is an empty list; it needs at least one frame")
    frames = [np.asarray(frame) for frame in video]
    for i, frame in enumerate(frames):
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3 or 0 in frame.shape:
            raise InputError(
                f"frame {i} of the video is {frame.dtype} {list(frame.shape)}; a frame is uint8 "
                "[H, W, 3], RGB from 0 to 255"
            )
        if frame.shape != frames[0].shape:
            raise InputError(
                f"frame {i} of the video is {list(frame.shape)} and frame 0 "
                f"{list(frames[0].shape)}; all frames of a video have one size"
            )
    return frames


def _detections(
    clip: Clip,
    frames: Sequence[np.ndarray],
    how: Preprocessing,
    *,
    given: int,
    indices: np.ndarray | None = None,
    info=None,
    path: Path | None = None,
) -> Detections | None:
    """Return the objects in the sampled frames, or None if no detections were given."""
    source = clip.detections
    if source is None or not how.objects:
        return None
    if isinstance(source, str | os.PathLike):
        return detections.from_file(Path(source), path, info, how.objects)
    if not isinstance(source, Detections) and callable(source):
        return detections.checked(source(np.stack(frames)), len(frames), "the detector's result")
    if not isinstance(source, Detections):
        raise InputError(
            f"detections are a {type(source).__name__}; pass stoa_jax.Detections, a file, or a "
            "detector"
        )
    of_all = len(np.asarray(source.classes)) == given != len(frames)
    found = detections.checked(source, given if of_all else len(frames), "detections")
    if of_all and indices is not None:
        found = Detections(
            found.boxes[indices], found.classes[indices], found.scores[indices], found.names
        )
    return found
