"""Resize frames and crop their centre as in CLIP's training; used by training and inference.

CLIP uses PIL's bicubic filter, which widens with the reduction (antialiasing). In evaluation and
inference, `resize_and_crop` applies that filter to the pixels that remain. In training,
`resample` is OpenCV's filter after a small blur that widens it; it stays within `TOLERANCE` of
PIL's and takes a fifth of its time. Neither TensorFlow nor TFDS is imported.
"""

import functools

import numpy as np

# Mean absolute difference of `resample` from PIL on photographs, in levels of 255.
TOLERANCE = 1.0

NO_BLUR = 1.2  # reductions up to this need no blur
MOST_BLUR = 2.3  # beyond this, a blur of three taps cannot widen the filter enough

Crop = tuple[float, float, float, float]  # left, top, width, height in pixels of the frame


def resize_and_crop(frame: np.ndarray, size: int) -> np.ndarray:
    """Resize uint8 [H, W, 3] to a short side of `size` and crop the centre: uint8 [size, size, 3].

    Equal to CLIP's preprocessing, except for single levels where rounding differs. A frame that has
    the size already is returned unchanged.
    """
    height, width = frame.shape[:2]
    if (height, width) == (size, size):
        return frame
    left, top, across, down = center_crop(height, width, size)
    return _resample_by_pil(frame, size, size, (left, top, left + across, top + down))


def center_crop(height: int, width: int, size: int) -> Crop:
    """Return the part of a frame that `resize_and_crop` keeps; its edges may lie within pixels."""
    new_height, new_width, left, top = _geometry(height, width, size)
    x, y = width / new_width, height / new_height
    return left * x, top * y, size * x, size * y


def center_window(height: int, width: int, size: int) -> tuple[int, int, int, int]:
    """Return the part of a frame that `center_crop` names, in whole pixels."""
    left, top, across, down = (round(x) for x in center_crop(height, width, size))
    return min(left, width - across), min(top, height - down), across, down


def resample(
    frame: np.ndarray, height: int, width: int, out: np.ndarray | None = None
) -> np.ndarray:
    """Resize uint8 [H, W, 3] to [height, width, 3], close to PIL's antialiased bicubic filter.

    With `out`, the result is written there and `out` returned. Without it, a frame that has the
    size already is returned unchanged.
    """
    if out is None:
        return _resample(frame, height, width)
    resized = _resample(frame, height, width, out)
    if resized is not out:
        out[...] = resized
    return out


def _resample(
    frame: np.ndarray, height: int, width: int, out: np.ndarray | None = None
) -> np.ndarray:
    import cv2  # imported here because it is slow and `resize_and_crop` does not need it

    reduction = frame.shape[0] / height, frame.shape[1] / width
    if reduction == (1, 1):
        return frame
    if max(reduction) > MOST_BLUR:
        return _resample_by_pil(frame, height, width)
    if max(reduction) > NO_BLUR:
        frame = _blur(frame, *reduction)
    return cv2.resize(frame, (width, height), dst=out, interpolation=cv2.INTER_CUBIC)


@functools.lru_cache(maxsize=64)
def _geometry(height: int, width: int, size: int) -> tuple[int, int, int, int]:
    """Return CLIP's height and width after resizing, and left and top of the crop."""
    if width <= height:
        new_height, new_width = int(size * height / width), size
    else:
        new_height, new_width = size, int(size * width / height)
    return new_height, new_width, round((new_width - size) / 2), round((new_height - size) / 2)


def _blur(frame: np.ndarray, down: float, across: float) -> np.ndarray:
    """Widen OpenCV's bicubic filter to that of a reduction by `down` and `across`."""
    import cv2

    sigmas = [0.35 + 0.35 * (r - 1) if r > 1 else 0.01 for r in (across, down)]
    return cv2.GaussianBlur(
        frame, (3, 3), sigmaX=sigmas[0], sigmaY=sigmas[1], borderType=cv2.BORDER_REPLICATE
    )


def _resample_by_pil(
    frame: np.ndarray,
    height: int,
    width: int,
    box: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(frame))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box))
