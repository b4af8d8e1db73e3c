"""Render the tracks of a scene, and read exact boxes from the result.

T frames, S side in pixels, n objects.
"""

import functools

import cv2
import numpy as np

from stoa_jax.data.synthetic.motion import Tracks
from stoa_jax.data.synthetic.scene import Scene

_RGB = {
    "red": (225, 35, 35),
    "orange": (255, 140, 20),
    "yellow": (250, 225, 40),
    "green": (45, 185, 60),
    "blue": (45, 95, 245),
    "purple": (135, 45, 185),
    "pink": (255, 140, 195),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
    "gray": (128, 128, 128),
    "tan": (190, 168, 130),
    "teal": (40, 110, 112),
    "navy": (38, 44, 92),
}
# A mark in the middle of each shape, as real objects have markings: a small vision transformer
# learns colours in a hundred steps, but outlines hardly in six hundred
# (benchmarks/notes/motion.md).
_CORE = {
    "ball": (0, 235, 235),
    "square": (235, 0, 235),
    "triangle": (170, 255, 0),
    "star": (105, 60, 20),
    "heart": (0, 110, 60),
    "moon": (120, 0, 50),
    "cross": (165, 215, 255),
    "ring": (160, 130, 0),
    "diamond": (85, 85, 95),
    "arrow": (255, 240, 180),
}
_CORE_RADIUS = 0.5
_MARGIN = 1.1  # a sprite extends a little beyond the unit circle
_LEVELS = (8, 10, 12, 14, 17, 20, 24, 29, 35, 42, 50, 60, 72, 96, 128, 192)
_FINE = 192


def draw(
    scene: Scene, tracks: Tracks, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Render frames uint8 [T, S, S, 3], boxes float32 [T, n, 4], visible shares float32 [T, n].

    A box holds the visible pixels of its object, as xyxy in [0, 1]; it is zero if there are none.
    """
    count, length = tracks.radii.shape
    canvas = np.repeat(_background(*scene.background, size, rng)[None], length, 0)
    owner = np.full((length, size, size), -1, np.int8)
    drawn = np.zeros((length, count), np.float32)
    looks = [(thing.shape, thing.colour, thing.texture) for thing in scene.things]
    for k in tracks.order:
        for t in np.flatnonzero(tracks.shown[k]):
            radius = tracks.radii[k, t] * size
            x, y = tracks.centres[k, t] * size
            left, top = max(int(x - _MARGIN * radius), 0), max(int(y - _MARGIN * radius), 0)
            right = min(int(x + _MARGIN * radius) + 1, size)
            bottom = min(int(y + _MARGIN * radius) + 1, size)
            sprite = _sprite(*looks[k], _level(2 * radius))
            ratio = sprite.shape[0] / (2 * _MARGIN * radius)
            # pixel centres of the window, in coordinates of the sprite
            shift = [
                (start + 0.5 - centre) * ratio + sprite.shape[0] / 2 - 0.5
                for start, centre in ((left, x), (top, y))
            ]
            patch = cv2.warpAffine(
                sprite,
                np.array([[ratio, 0, shift[0]], [0, ratio, shift[1]]]),
                (right - left, bottom - top),
                flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            )
            window = canvas[t, top:bottom, left:right]
            window *= 1 - patch[..., 3:]
            window += patch[..., :3]
            solid = patch[..., 3] > 0.5
            owner[t, top:bottom, left:right][solid] = k
            drawn[t, k] = np.count_nonzero(solid)
    boxes = np.zeros((length, count, 4), np.float32)
    share = np.zeros((length, count), np.float32)
    for k in range(count):
        mine = owner == k
        boxes[:, k] = _extents(mine)
        share[:, k] = np.count_nonzero(mine, (1, 2)) / np.maximum(drawn[:, k], 1)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8), boxes, share


def _extents(mask: np.ndarray) -> np.ndarray:
    """Return boxes [T, 4] of masks [T, S, S]."""
    size = mask.shape[-1]
    columns, rows = np.asarray(mask.any(1)), np.asarray(mask.any(2))  # [T, S]
    box = np.stack(
        [
            columns.argmax(1),
            rows.argmax(1),
            size - columns[:, ::-1].argmax(1),
            size - rows[:, ::-1].argmax(1),
        ],
        -1,
    )
    return np.where(np.asarray(columns.any(1))[:, None], box / size, 0).astype(np.float32)


def _background(kind: str, tone: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return a muted background, float32 [S, S, 3]."""
    base = np.array(_RGB[tone], np.float32) + rng.uniform(-8, 8)
    y, x = (np.mgrid[0:size, 0:size] + 0.5) / size
    angle, phase = rng.uniform(0, np.pi), rng.uniform(0, 1)
    along = x * np.cos(angle) + y * np.sin(angle)
    if kind == "shaded":
        change = 0.55 * (along - along.mean()) * rng.choice((-1, 1))
    elif kind == "grainy":
        change = cv2.GaussianBlur(rng.normal(0, 0.22, (size, size)).astype(np.float32), (3, 3), 0.6)
    elif kind == "striped":
        change = np.where((along * 7 + phase) % 1 < 0.5, 0.11, -0.11)
    elif kind == "checked":
        change = np.where((np.floor(x * 8 + phase) + np.floor(y * 8 + phase)) % 2 == 0, 0.1, -0.1)
    else:
        change = np.zeros((size, size))
    return (base * (1 + change[..., None])).astype(np.float32)


def _level(diameter: float) -> int:
    return next((level for level in _LEVELS if level >= diameter), _LEVELS[-1])


@functools.lru_cache(maxsize=8192)
def _sprite(shape: str, colour: str, texture: str, diameter: int) -> np.ndarray:
    """Return a sprite with premultiplied alpha, float32 [D, D, 4]; D includes margins."""
    side = round(diameter * _MARGIN)
    fine = _fine(shape, colour, texture)
    sprite = cv2.resize(fine, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32)
    sprite[..., 3] /= 255
    return sprite


@functools.cache  # all looks together take 40 MB
def _fine(shape: str, colour: str, texture: str) -> np.ndarray:
    """Return a large sprite: colours times alpha, and alpha, uint8 [F, F, 4]."""
    mask = _mask(shape)
    y, x = (np.mgrid[0:_FINE, 0:_FINE] + 0.5) / _FINE * 2 * _MARGIN - _MARGIN
    fill = np.array(_RGB[colour], np.float32)
    light = np.full(3, 245 if colour != "black" else 190, np.float32)
    mark = light if colour in ("blue", "purple", "red", "green", "black") else fill * 0.25
    if texture == "striped":
        marked = (x + y) * 0.9 % 1 < 0.42
    elif texture == "dotted":
        marked = np.hypot(x * 1.45 % 1 - 0.5, y * 1.45 % 1 - 0.5) < 0.29
    else:
        marked = np.zeros_like(mask, bool)
    rgb = np.where(marked[..., None], mark, fill)
    edge = fill * 0 + 150 if colour == "black" else fill * 0.4
    thickness = int(0.09 * _FINE / 2 / _MARGIN)
    inner = cv2.erode(mask, np.ones((2 * thickness + 1,) * 2, np.uint8))
    rgb = np.where(inner[..., None] > 0, rgb, edge)
    core = np.hypot(x, y) < _CORE_RADIUS
    rgb = np.where(core[..., None], np.array(_CORE[shape], np.float32), rgb)
    solid = (mask > 0) | core
    look = np.concatenate([rgb, np.full_like(rgb[..., :1], 255)], -1)
    return (look * solid[..., None]).astype(np.uint8)


@functools.lru_cache(maxsize=16)
def _mask(shape: str) -> np.ndarray:
    """Return a shape in the unit circle, uint8 [F, F] of 0 and 1."""
    mask = np.zeros((_FINE, _FINE), np.uint8)

    def fill(points, value=1):
        pixels = (np.asarray(points, float) + _MARGIN) / (2 * _MARGIN) * _FINE
        cv2.fillPoly(mask, [np.round(pixels).astype(np.int32)], value)

    def disc(x, y, radius, value=1):
        turn = np.linspace(0, 2 * np.pi, 96)
        fill(np.stack([x + radius * np.cos(turn), y + radius * np.sin(turn)], -1), value)

    def spokes(corners, radii, start=-np.pi / 2):
        turn = start + 2 * np.pi * np.arange(corners) / corners
        radius = np.resize(radii, corners)
        return np.stack([radius * np.cos(turn), radius * np.sin(turn)], -1)

    if shape == "ball":
        disc(0, 0, 0.92)
    elif shape == "square":
        fill([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)])
    elif shape == "triangle":
        fill([(0, -0.95), (1.0, 0.8), (-1.0, 0.8)])
    elif shape == "star":
        fill(spokes(10, (1.08, 0.46)))
    elif shape == "heart":
        t = np.linspace(0, 2 * np.pi, 128)
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        fill(np.stack([16 * np.sin(t) ** 3, -y - 2], -1) / 16.5)
    elif shape == "moon":
        disc(0.1, 0, 1.0)
        disc(0.66, -0.1, 0.74, 0)
    elif shape == "cross":
        fill([(-0.34, -0.98), (0.34, -0.98), (0.34, 0.98), (-0.34, 0.98)])
        fill([(-0.98, -0.34), (0.98, -0.34), (0.98, 0.34), (-0.98, 0.34)])
    elif shape == "ring":
        disc(0, 0, 1.0)
        disc(0, 0, 0.42, 0)
    elif shape == "diamond":
        fill([(0, -1.05), (0.8, 0), (0, 1.05), (-0.8, 0)])
    elif shape == "arrow":
        fill([(0, -1.05), (0.85, -0.1), (-0.85, -0.1)])
        fill([(-0.32, -0.15), (0.32, -0.15), (0.32, 1.0), (-0.32, 1.0)])
    else:
        raise ValueError(f"no such shape: {shape}")
    return mask
