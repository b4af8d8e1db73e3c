"""Crops and flips of frames, and of the boxes on them. Pure functions of arrays and a generator.

T frames, K objects. A crop is (left, top, width, height) in whole pixels of the stored frame, the
same for all frames of a clip, so that motion stays motion.
"""

import cv2
import numpy as np

Crop = tuple[int, int, int, int]

MIN_AREA_LEFT = 0.1  # share of a box that a crop must leave, or the box goes
CROP_AREA = (0.6, 1.0)  # share of the largest square that a random crop takes
CROP_ASPECT = (0.8, 1.25)


def center_crop(height: int, width: int) -> Crop:
    """The largest square in the middle."""
    side = min(height, width)
    return (width - side) // 2, (height - side) // 2, side, side


def random_crop(rng: np.random.Generator, height: int, width: int) -> Crop:
    """A moderate part of the frame, near square, anywhere."""
    side = min(height, width)
    area = rng.uniform(*CROP_AREA) * side * side
    aspect = np.exp(rng.uniform(*np.log(CROP_ASPECT)))
    crop_width = int(np.clip(round(np.sqrt(area * aspect)), 1, width))
    crop_height = int(np.clip(round(np.sqrt(area / aspect)), 1, height))
    left = int(rng.integers(width - crop_width + 1))
    top = int(rng.integers(height - crop_height + 1))
    return left, top, crop_width, crop_height


def crop_frames(frames: np.ndarray, crop: Crop, size: int, flip: bool, out: np.ndarray) -> None:
    """Cuts [T, H, W, 3] by `crop`, resizes to `size`, mirrors; writes to `out` [T, S, S, 3]."""
    left, top, width, height = crop
    # As CLIP was trained, bicubic; below half the size OpenCV's would alias, and area averages.
    method = cv2.INTER_AREA if min(width, height) >= 2 * size else cv2.INTER_CUBIC
    for t, frame in enumerate(frames):
        part = frame[top : top + height, left : left + width]
        if (width, height) != (size, size):
            part = cv2.resize(part, (size, size), interpolation=method)
        out[t] = part[:, ::-1] if flip else part


def crop_boxes(
    boxes: np.ndarray, classes: np.ndarray, height: int, width: int, crop: Crop, flip: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [..., 4] of the frame as boxes of the crop; class -1 where too little is left."""
    left, top, crop_width, crop_height = crop
    origin = np.array([left, top, left, top], np.float32)
    extent = np.array([crop_width, crop_height] * 2, np.float32)
    moved = (boxes * np.array([width, height] * 2, np.float32) - origin) / extent
    seen = np.clip(moved, 0, 1)
    area = _area(moved)
    kept = (classes >= 0) & (area > 0) & (_area(seen) >= MIN_AREA_LEFT * area)
    if flip:
        seen = np.stack([1 - seen[..., 2], seen[..., 1], 1 - seen[..., 0], seen[..., 3]], -1)
    return np.where(kept[..., None], seen, np.float32(0)), np.where(kept, classes, -1)


def best_objects(
    boxes: np.ndarray, classes: np.ndarray, scores: np.ndarray, objects: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The `objects` surest of each frame, best first, padding last; [T, K, ...] -> [T, k, ...]."""
    scores = np.where(classes >= 0, scores, np.float32(0))
    order = np.argsort(np.where(classes >= 0, -scores, np.inf), 1, kind="stable")[:, :objects]
    return (
        np.take_along_axis(boxes, order[..., None], 1),
        np.take_along_axis(classes, order, 1),
        np.take_along_axis(scores, order, 1),
    )


def frame_indices(stored: int, frames: int) -> np.ndarray:
    """`frames` of `stored` indices, uniformly spaced: the middles of equal stretches."""
    return np.floor((np.arange(frames) + 0.5) * stored / frames).astype(np.int64)


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
