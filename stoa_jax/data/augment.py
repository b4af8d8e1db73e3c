"""Crop and flip frames and the boxes on them: pure functions of arrays and a random generator.

T frames, K objects. All frames of a clip are cropped alike, so that motion is preserved.
"""

from collections.abc import Sequence

import numpy as np

from stoa_jax.data import resize

Window = tuple[int, int, int, int]  # left, top, width, height in whole pixels

MIN_AREA_LEFT = 0.1  # share of a box that must remain in the crop; boxes with less are dropped
CROP_AREA = (0.6, 1.0)  # range of the area of a random crop, as a share of the largest square
CROP_ASPECT = (0.8, 1.25)


def random_crop(rng: np.random.Generator, height: int, width: int) -> Window:
    """Sample a large, nearly square part of the frame."""
    side = min(height, width)
    area = rng.uniform(*CROP_AREA) * side * side
    aspect = np.exp(rng.uniform(*np.log(CROP_ASPECT)))
    crop_width = int(np.clip(round(np.sqrt(area * aspect)), 1, width))
    crop_height = int(np.clip(round(np.sqrt(area / aspect)), 1, height))
    left = int(rng.integers(width - crop_width + 1))
    top = int(rng.integers(height - crop_height + 1))
    return left, top, crop_width, crop_height


def crop_frames(
    frames: Sequence[np.ndarray], crop: Window, size: int, flip: bool, out: np.ndarray
) -> None:
    """Crop and resize [T, H, W, 3] into `out` [T, S, S, 3]; mirror it if `flip`."""
    left, top, width, height = crop
    for t, frame in enumerate(frames):
        resize.resample(frame[top : top + height, left : left + width], size, size, out[t])
    if flip:
        out[...] = out[:, :, ::-1].copy()


def copy_frames(frames: Sequence[np.ndarray], flip: bool, out: np.ndarray) -> None:
    """Copy frames [T, S, S, 3] into `out`; mirror them if `flip`."""
    if flip:
        frames = [frame[:, ::-1] for frame in frames]
    if isinstance(frames, np.ndarray):
        out[...] = frames
    else:
        np.stack(frames, out=out)


def crop_boxes(
    boxes: np.ndarray, classes: np.ndarray, height: int, width: int, crop: resize.Crop, flip: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Map boxes [..., 4] of the frame to the crop; class -1 where too little of a box remains."""
    left, top, crop_width, crop_height = crop
    origin = np.array([left, top, left, top], np.float32)
    extent = np.array([crop_width, crop_height] * 2, np.float32)
    moved = (boxes * np.array([width, height] * 2, np.float32) - origin) / extent
    seen = np.clip(moved, 0, 1)
    area = _area(moved)
    kept = (classes >= 0) & (area > 0) & (_area(seen) >= MIN_AREA_LEFT * area)
    classes = np.where(kept, classes, -1)
    if flip:
        return mirror_boxes(seen, classes), classes
    return np.where(kept[..., None], seen, np.float32(0)), classes


def mirror_boxes(boxes: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Mirror boxes [..., 4] left to right; boxes of class -1 become 0."""
    mirrored = np.stack([1 - boxes[..., 2], boxes[..., 1], 1 - boxes[..., 0], boxes[..., 3]], -1)
    return np.where((classes >= 0)[..., None], mirrored, np.float32(0))


def best_objects(
    boxes: np.ndarray, classes: np.ndarray, scores: np.ndarray, objects: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keep the `objects` most confident per frame, best first: [T, K, ...] -> [T, k, ...]."""
    scores = np.where(classes >= 0, scores, np.float32(0))
    order = np.argsort(np.where(classes >= 0, -scores, np.inf), 1, kind="stable")[:, :objects]
    return (
        np.take_along_axis(boxes, order[..., None], 1),
        np.take_along_axis(classes, order, 1),
        np.take_along_axis(scores, order, 1),
    )


def frame_indices(stored: int, frames: int) -> np.ndarray:
    """Return `frames` uniformly spaced indices below `stored`: the middles of equal parts."""
    return np.floor((np.arange(frames) + 0.5) * stored / frames).astype(np.int64)


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
