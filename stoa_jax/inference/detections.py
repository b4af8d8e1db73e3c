"""Detections passed with a video: checks of arrays and detectors, and files matched to frames."""

import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from stoa_jax.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class Detections:
    """Objects in every frame of a clip; boxes are xyxy as fractions of the frame's sides.

    >>> boxes = np.tile(np.float32([0.1, 0.2, 0.4, 0.5]), (8, 1, 1))  # 8 frames, 1 object
    >>> found = stoa_jax.Detections(boxes, np.zeros((8, 1), int), np.ones((8, 1)), ("star",))
    >>> clip = stoa_jax.Clip(np.zeros((8, 48, 48, 3), np.uint8), detections=found)
    >>> model.explain(clip, "a star rises").trajectories[0].name
    'star'
    """

    boxes: np.ndarray  # [T, K, 4] in [0, 1]
    classes: np.ndarray  # int [T, K], -1 for padding
    scores: np.ndarray  # [T, K]
    names: Sequence[str]  # of the classes


Detector = Callable[[np.ndarray], Detections]  # frames uint8 [T, H, W, 3] -> their objects


def load_detector(
    directory: str | os.PathLike[str],
    threshold: float = 0.5,
    *,
    device: str = "",
    batch_size: int = 12,
) -> Detector:
    """Open a Hugging Face object-detection model, to be run on the frames of clips.

    `directory` may also be a name on the Hub. Objects below `threshold` are left out. Needs
    PyTorch and transformers (`pip install 'stoa-jax[torch]'`).

    >>> detector = stoa_jax.load_detector("PekingU/rtdetr_r50vd")
    >>> clip = stoa_jax.Clip("example.mp4", detections=detector)
    """
    from stoa_jax.data.detections.detector import load_detector as load_model

    find = load_model(directory, threshold, device, batch_size)
    one_at_a_time = threading.Lock()  # videos are prepared by several threads

    def detector(frames: np.ndarray) -> Detections:
        with one_at_a_time:
            found = find(list(frames))
        return of_lists(found, *frames.shape[1:3])

    return detector


def of_lists(
    found: Sequence[Sequence[tuple[Sequence[float], str, float]]], height: int, width: int
) -> Detections:
    """Return detections of lists of (box in pixels, class, score), one list for each frame."""
    names = tuple(sorted({name for objects in found for _, name, _ in objects}))
    most = max(map(len, found), default=0)
    boxes = np.zeros((len(found), most, 4), np.float32)
    classes = np.full((len(found), most), -1, np.int32)
    scores = np.zeros((len(found), most), np.float32)
    for t, objects in enumerate(found):
        for k, (box, name, score) in enumerate(objects):
            # A detector's boxes may reach a little over the edge of the frame.
            boxes[t, k] = np.clip(np.divide(box, (width, height, width, height)), 0, 1)
            classes[t, k], scores[t, k] = names.index(name), score
    return Detections(boxes, classes, scores, names)


def checked(found: Detections, frames: int, what: str) -> Detections:
    """Return detections of `frames` frames as arrays of the right types, or raise InputError."""
    if not isinstance(found, Detections):
        raise InputError(f"{what} is a {type(found).__name__}; it must be stoa_jax.Detections")
    boxes, scores = np.asarray(found.boxes, np.float32), np.asarray(found.scores, np.float32)
    classes = np.asarray(found.classes)
    if classes.size and not np.issubdtype(classes.dtype, np.integer):
        raise InputError(
            f"{what}: classes are {classes.dtype}; they must be integers, -1 for padding"
        )
    if classes.ndim != 2 or boxes.shape != (*classes.shape, 4) or scores.shape != classes.shape:
        raise InputError(
            f"{what}: boxes {list(boxes.shape)}, classes {list(classes.shape)} and scores "
            f"{list(scores.shape)} disagree; they are [T, K, 4], [T, K] and [T, K]"
        )
    if len(classes) != frames:
        raise InputError(
            f"{what}: objects of {len(classes)} frames, but the clip has {frames}; detect in the "
            "frames that the model samples, for example by passing a detector"
        )
    valid, names = classes >= 0, tuple(str(name) for name in found.names)
    if valid.any() and classes.max() >= len(names):
        raise InputError(f"{what}: class {classes.max()} with {len(names)} names; name every class")
    shown = boxes[valid]
    if not np.isfinite(shown).all() or not np.isfinite(scores[valid]).all():
        raise InputError(f"{what}: a box or score is not finite; leave such objects out (class -1)")
    if len(shown) and (shown.min() < -0.01 or shown.max() > 1.01):
        worst = shown.flat[np.abs(shown - 0.5).argmax()]
        raise InputError(
            f"{what}: a coordinate is {worst:g}; boxes are fractions of the frame: divide "
            "pixels by the frame's width and height"
        )
    inverted = (shown[:, 2:] < shown[:, :2]).any(-1)
    if inverted.any():
        box = shown[inverted.argmax()].round(3).tolist()
        raise InputError(f"{what}: the box {box} ends before it begins; boxes are x1, y1, x2, y2")
    return Detections(np.clip(boxes, 0, 1), classes.astype(np.int32), scores, names)


def names_video(path: str | Path, video: Path) -> bool:
    """Return whether a file or directory has detections of a video, by the video's file name."""
    path = Path(path)
    return path.exists() and video.stem in _open(path, path.stat().st_mtime_ns)


def from_file(path: Path, video: Path | None, info, objects: int) -> Detections:
    """Return the detections in a file for the sampled frames of a video file."""
    if video is None or info is None:
        raise InputError(
            f"{path}: a file's detections are found by the video's name, and this video has none; "
            "pass the video as a path, or detections as stoa_jax.Detections"
        )
    if not path.exists():
        raise InputError(f"{path}: no such file or directory of detections")
    table = _open(path, path.stat().st_mtime_ns)
    if video.stem not in table:
        raise InputError(
            f"{path}: no detections of video {video.stem!r} in it (it has {len(table)} video(s)); "
            "is it the file of another video?"
        )
    boxes, classes, scores, problems = table.objects(video.stem, info, objects)
    for problem in problems:
        import warnings

        warnings.warn(f"{path}: {video.stem}: {problem}", stacklevel=2)
    return Detections(boxes, classes, scores, table.class_names)


@functools.lru_cache(maxsize=32)
def _open(path: Path, modified: int):
    from stoa_jax.data.detections import open_detections

    return open_detections(path)
