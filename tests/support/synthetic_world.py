"""Clips and scenes of the synthetic world, and motions read from boxes, for several tests."""

import numpy as np
import pytest

from stoa_jax.data.synthetic import World

COUNT = 200


@pytest.fixture(scope="module")
def clips():
    world = World("train", size=48)
    return [world.clip(i) for i in range(COUNT)]


@pytest.fixture(scope="module")
def many():
    world = World("train")
    return [world.scene(i) for i in range(1500)]


def measured(clip):
    shown = clip.true_classes >= 0
    boxes = np.where(shown[..., None], clip.true_boxes.astype(float), np.nan)
    centres = (boxes[..., :2] + boxes[..., 2:]) / 2
    sides = boxes[..., 2:] - boxes[..., :2]
    return centres, sides[..., 0] * sides[..., 1], shown


def ends(values):
    known = values[~np.isnan(values).reshape(len(values), -1).any(1)]
    return known[0], known[-1]


def holds(event, clip) -> bool:
    """Return whether the event is visible in the boxes."""
    name, a, b = event["motion"], event["subject"], event["other"]
    span = {0: slice(None), 1: slice(0, 6), 2: slice(6, None)}[event["phase"]]
    centres, areas, shown = (x[span] for x in measured(clip))
    if name == "blink":
        return not shown[:, a].all() and shown[:, a].any()
    first, last = ends(centres[:, a])
    dx, dy = last - first
    if name in ("left", "right"):
        return abs(dy) < 0.04 and (-dx if name == "left" else dx) > 0.1
    if name in ("up", "down"):
        return abs(dx) < 0.04 and (-dy if name == "up" else dy) > 0.1
    if name == "circle":
        return bool((np.nanmax(centres[:, a], 0) - np.nanmin(centres[:, a], 0)).min() > 0.12)
    if name in ("grow", "shrink"):
        small, large = ends(areas[:, a])
        return (large / small if name == "grow" else small / large) > 1.5
    apart = np.hypot(*np.moveaxis(centres[:, a] - centres[:, b], -1, 0))
    begin, end = ends(apart)
    other = np.hypot(*np.subtract(*ends(centres[:, b])))
    if name == "push":
        return other > 0.1 and begin > end
    if name in ("approach", "meet"):
        return begin - end > 0.12 and (other > 0.06) == (name == "meet")
    if name in ("leave", "part"):
        return end - begin > 0.12 and (other > 0.06) == (name == "part")
    return np.nanmin(apart) < 0.13 and begin > 0.12  # only pixels show which one is behind
