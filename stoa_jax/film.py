"""Film strips: a clip's frames side by side, with trajectories boxed or attention overlaid."""

import base64
from collections.abc import Sequence

import cv2
import numpy as np

# Okabe and Ito's colours, which people with colour blindness can distinguish.
PALETTE = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
    (200, 200, 200),
)
GAP = 4  # pixels between frames


def colour(i: int) -> tuple[int, int, int]:
    """Return the RGB colour of trajectory `i`."""
    return PALETTE[i % len(PALETTE)]


def hex_colour(i: int) -> str:
    """Return the colour of trajectory `i` in CSS notation."""
    return "#{:02x}{:02x}{:02x}".format(*colour(i))


def strip(
    frames: Sequence[np.ndarray],
    boxes: np.ndarray | None = None,
    shown: np.ndarray | None = None,
    height: int = 160,
) -> np.ndarray:
    """Put frames [T, H, W, 3] side by side: uint8 [h, w, 3].

    `boxes` [N, T, 4] are xyxy in [0, 1], with one colour per trajectory; a box is drawn where
    `shown` [N, T] is True.
    """
    out = []
    for t, frame in enumerate(frames):
        picture = _scaled(frame, height)
        if boxes is not None:
            for i in range(len(boxes)):
                if shown is None or shown[i, t]:
                    _box(picture, boxes[i, t], colour(i))
        out.append(picture)
    return _row(out)


def attention_strip(
    frames: Sequence[np.ndarray], attention: np.ndarray, height: int = 160
) -> np.ndarray:
    """Put frames side by side with attention [T, h, w] as brightness."""
    top = float(attention.max()) or 1.0
    out = []
    for frame, weights in zip(frames, attention, strict=True):
        picture = _scaled(frame, height)
        light = cv2.resize(
            (weights / top).astype(np.float32),
            (picture.shape[1], picture.shape[0]),
            interpolation=cv2.INTER_NEAREST,
        )
        out.append((picture * (0.25 + 0.75 * light[..., None])).astype(np.uint8))
    return _row(out)


def _scaled(frame: np.ndarray, height: int) -> np.ndarray:
    width = max(1, round(frame.shape[1] * height / frame.shape[0]))
    small = frame.shape[0] < height
    how = cv2.INTER_NEAREST if small else cv2.INTER_AREA
    return cv2.resize(np.ascontiguousarray(frame), (width, height), interpolation=how)


def _box(picture: np.ndarray, box: np.ndarray, rgb: tuple[int, int, int]) -> None:
    side = np.array([picture.shape[1], picture.shape[0]] * 2)
    x1, y1, x2, y2 = (int(v) for v in np.round(np.clip(box, 0, 1) * (side - 1)))
    cv2.rectangle(picture, (x1, y1), (x2, y2), (0, 0, 0), 4)
    cv2.rectangle(picture, (x1, y1), (x2, y2), rgb, 2)


def _row(pictures: list[np.ndarray]) -> np.ndarray:
    gap = np.full((pictures[0].shape[0], GAP, 3), 128, np.uint8)
    parts = [part for picture in pictures for part in (picture, gap)]
    return np.concatenate(parts[:-1], 1)


def data_address(picture: np.ndarray) -> str:
    """Encode an RGB image as a JPEG in a `data:` URL."""
    ok, data = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
    assert ok
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()
