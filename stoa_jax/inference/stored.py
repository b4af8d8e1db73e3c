"""Fusion features stored apart from their videos: encoded once, matched to texts later.

A clip is one row of float16 with its frames, their mean, objects with their mask, and actions, in
this order. That is 38 KB per clip at `base`.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from stoa_jax.inference import batching, programs
from stoa_jax.inference.videos import Prepared

if TYPE_CHECKING:
    from stoa_jax.inference.model import Model
    from stoa_jax.models.stoa import Stoa, VideoFeatures

_KEPT = ("frames", "cls", "objects", "object_mask", "actions")  # everything that fusion reads
PAIRS_AT_ONCE = 64


def encode(model: "Model", clips: Sequence[Prepared]) -> np.ndarray:
    """Return the fusion features of clips prepared with `preprocessing(fused=True)`, float16."""
    from stoa_jax.inference.fusing import features_input

    network = model.needs("match", "Index.add")
    features = batching.in_batches(
        lambda *x: programs.video_features(network, *x),
        16,
        *features_input(clips),
    )
    # Fusion reads the sum of a trajectory's projections, so only the sum is stored.
    features = features._replace(objects=features.trajectories)
    parts = [np.asarray(getattr(features, name)) for name in _KEPT]
    return np.concatenate([p.reshape(len(clips), -1).astype(np.float16) for p in parts], 1)


def match(model: "Model", stored: np.ndarray, text: str) -> np.ndarray:
    """Return the calibrated probability that a text matches each clip, float32 [n]."""
    network = model.needs("match", "Index.search")
    words = programs.text_features(network, model.tokens([text], "search", None, what="query"))
    shapes = _shapes(model, network)
    fused = []
    for first in range(0, len(stored), PAIRS_AT_ONCE):
        features = _unpacked(shapes, stored[first : first + PAIRS_AT_ONCE])
        rows = len(features.cls)
        pair = jax.tree.map(lambda x, rows=rows: np.repeat(np.asarray(x), rows, 0), words)
        out = batching.run_padded(lambda *x: programs.fuse_pairs(network, *x), features, pair)
        fused.append(batching.on_host(out, rows))
    cls, sep = (np.concatenate(x) for x in zip(*fused, strict=True))
    # All pairs at once and zero padding, because the head of `released` normalises over the rows.
    rows = batching.power_of_two(len(cls))
    padded = (np.pad(x, ((0, rows - len(x)), (0, 0))) for x in (cls, sep))
    return model.probability(np.asarray(programs.match_logits(network, *padded))[: len(cls)])


def _shapes(model: "Model", network: "Stoa") -> "VideoFeatures":
    """Return the shapes of one clip's features."""
    how = model.preprocessing(fused=True)
    t, k, s = how.frames, how.objects, how.size
    inputs = [
        jax.ShapeDtypeStruct(shape, kind)
        for shape, kind in [
            ((1, t, s, s, 3), np.uint8),
            ((1, t, k, 4), np.float32),
            ((1, t, k), np.int32),
            ((1, t, k), np.float32),
        ]
    ]
    return jax.eval_shape(programs.video_features, network, *inputs)


def _unpacked(shapes: "VideoFeatures", stored: np.ndarray) -> "VideoFeatures":
    parts, first = {}, 0
    for name in _KEPT:
        like = getattr(shapes, name)
        size = math.prod(like.shape[1:])
        part = stored[:, first : first + size].reshape(len(stored), *like.shape[1:])
        parts[name] = part.astype(like.dtype)
        first += size
    classes = np.full((len(stored), *shapes.object_classes.shape[1:]), -1, np.int32)
    none = np.zeros((len(stored), 0, *shapes.verbs.shape[2:]), shapes.verbs.dtype)
    return shapes._replace(**parts, object_classes=classes, verbs=none, adjectives=none)
