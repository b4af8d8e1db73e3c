"""Where every object is at every time: a scene's events as paths, laid out without collisions.

n objects, T frames. Lengths are in units of the frame's side. In the middle of the clip, a motion
has the same position and size in either direction, so that a single frame does not reveal it.
"""

import dataclasses
import math

import numpy as np

from stoa_jax.data.synthetic.scene import ALWAYS, DIRECTIONS, FIRST, Event, Scene

RADIUS = {"small": 0.15, "big": 0.21}
_STEP = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
_REACH = 0.21  # half of a whole-clip move; a half-clip move goes 1.3 times as far
_ORBIT = 0.12
_GROWTH = 1.55
_GAP = 0.015
_CANDIDATES = 96


@dataclasses.dataclass(frozen=True)
class Tracks:
    """The exact course of a clip."""

    centres: np.ndarray  # [n, T, 2]
    radii: np.ndarray  # [n, T]
    shown: np.ndarray  # [n, T] bool; False while a blinking object is off
    order: tuple[int, ...]  # back to front


def lay_out(scene: Scene, frames: int, rng: np.random.Generator) -> Tracks:
    """Sample free parameters and positions until no objects collide that should not."""
    # More than four objects share the room of four.
    best, shrink = None, min(1.0, (4 / len(scene.things)) ** 0.5)
    for _ in range(10):
        paths = _Paths(scene, frames, shrink, rng)
        centres, gap = paths.place(rng)
        if best is None or gap > best[0]:
            best = (gap, centres, paths)
        if gap > 0:
            break
        shrink *= 0.95  # too crowded: make objects and paths a little smaller
    assert best is not None
    _, centres, paths = best
    order = rng.permutation(len(scene.things)).tolist()
    for event in scene.events:
        if event.motion in ("behind", "front"):
            below, above = event.subject, event.other
            if event.motion == "front":
                below, above = above, below
            order.remove(above)
            order.insert(order.index(below) + 1, above)
    return Tracks(centres, paths.radii, paths.shown, tuple(order))


class _Paths:
    """Offsets of each object from its home position, before the homes are chosen."""

    def __init__(self, scene: Scene, frames: int, shrink: float, rng: np.random.Generator):
        count = len(scene.things)
        self.time = np.linspace(0.0, 1.0, frames) if frames > 1 else np.array([0.5])
        self.shrink = shrink
        self.base = np.array([RADIUS[t.size] for t in scene.things]) * shrink
        self.offsets = np.zeros((count, frames, 2))
        self.scale = np.ones((count, frames))
        self.shown = np.ones((count, frames), bool)
        self.pair: tuple[int, int, np.ndarray] | None = None  # subject, other, offset of the other
        self.may_touch = False
        for event in scene.events:
            if event.other is None:
                self._alone(event, rng)
            else:
                self._together(event, rng)
        self.radii = self.base[:, None] * self.scale

    def _alone(self, event: Event, rng: np.random.Generator) -> None:
        whole, first = event.phase == ALWAYS, event.phase == FIRST
        begin, length = (0.0, 1.0) if whole else (0.0 if first else 0.5, 0.5)
        local = np.clip((self.time - begin) / length, 0.0, 1.0)
        # 0 in the middle of the clip, where the neighbouring phase takes over
        centred = 2 * local - 1 if whole else 1.3 * (local - 1 if first else local)
        subject, motion = event.subject, event.motion
        if motion in DIRECTIONS:
            reach = _REACH * self.shrink
            self.offsets[subject] += reach * centred[:, None] * np.array(_STEP[motion])
        elif motion == "circle":
            start = rng.uniform(0, 2 * math.pi)
            angle = start + 2 * math.pi * local * rng.choice((-1, 1))
            ring = np.stack([np.cos(angle) - np.cos(start), np.sin(angle) - np.sin(start)], -1)
            self.offsets[subject] += _ORBIT * self.shrink * ring
        elif motion in ("grow", "shrink"):
            self.scale[subject] *= _GROWTH ** (centred if motion == "grow" else -centred)
        else:
            beats = np.floor(np.minimum(local, 0.999) * (6 if whole else 3))
            dark = beats % 2 == (rng.integers(2) if whole else 0)
            inside = (self.time >= begin) & (self.time <= begin + length)
            self.shown[subject] &= ~(dark & inside)

    def _together(self, event: Event, rng: np.random.Generator) -> None:
        a, b, motion = event.subject, event.other, event.motion
        assert b is not None  # this motion involves two objects
        along = np.array(_STEP[DIRECTIONS[rng.integers(4)]], float)
        across = along[::-1] * rng.uniform(-0.04, 0.04)
        touch = self.base[a] + self.base[b]
        centred = (2 * self.time - 1)[:, None] * along * self.shrink
        distance = touch + 0.2 * self.shrink
        if motion in ("approach", "leave"):
            self.offsets[a] = 0.17 * (centred if motion == "approach" else -centred)
        elif motion in ("meet", "part"):
            sign = 1 if motion == "meet" else -1
            self.offsets[a], self.offsets[b] = 0.09 * sign * centred, -0.09 * sign * centred
        elif motion == "push":
            distance = 0.86 * touch
            gone = 0.46 * self.shrink * (self.time - 0.45)
            self.offsets[a] = gone[:, None] * along
            self.offsets[b] = np.maximum(gone, 0.0)[:, None] * along
            self.may_touch = True
        else:
            distance = 0.0
            # The meeting is not always in the middle, so a single frame may or may not show it.
            late = rng.uniform(-0.08, 0.08)
            travel = min(touch + 0.05, 0.36) * self.shrink
            self.offsets[a] = (travel * (2 * self.time - 1) + late)[:, None] * along
            self.may_touch = True
        self.pair = (a, b, along * distance + across)

    def place(self, rng: np.random.Generator) -> tuple[np.ndarray, float]:
        """Return centres [n, T, 2] of the best of some random layouts, and its smallest gap."""
        reach = self.radii[..., None] + 0.01  # [n, T, 1]
        low = (reach - self.offsets).max(1)  # [n, 2]: homes from which the whole path stays inside
        high = (1 - reach - self.offsets).min(1)
        if self.pair:
            a, b, apart = self.pair
            low[a] = np.maximum(low[a], low[b] - apart)
            high[a] = np.minimum(high[a], high[b] - apart)
        if (low > high).any():
            middle = (low + high) / 2
            fits = False
            low, high = np.minimum(low, middle), np.maximum(high, middle)
        else:
            fits = True
        homes = low + rng.random((_CANDIDATES, *low.shape)) * (high - low)  # [C, n, 2]
        if self.pair:
            homes[:, b] = homes[:, a] + apart
        gaps = np.full(_CANDIDATES, np.inf)
        for i in range(len(low)):
            for j in range(i):
                if self.may_touch and {i, j} == {a, b}:
                    continue
                between = (homes[:, i] - homes[:, j])[:, None] + self.offsets[i] - self.offsets[j]
                room = np.hypot(between[..., 0], between[..., 1]) - self.radii[i] - self.radii[j]
                gaps = np.minimum(gaps, room.min(1) - _GAP)
        # the first that fits, not the roomiest: otherwise positions would predict the motion
        chosen = int(np.argmax(gaps > 0)) if (gaps > 0).any() else int(np.argmax(gaps))
        centres = homes[chosen][:, None] + self.offsets
        return centres, float(gaps[chosen]) if fits else min(-1.0, float(gaps[chosen]))
