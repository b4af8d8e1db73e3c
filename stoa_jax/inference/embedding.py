"""Vectors of clips from the vision tower.

Shapes: b clips, T frames, d shared width.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from stoa_jax.inference import batching

if TYPE_CHECKING:
    import jax


def start_clip_vectors(
    encode: "Callable[[np.ndarray], jax.Array]",
    clips: Sequence[np.ndarray],
    *,
    unit: int,
    joint: bool,
) -> Callable[[], np.ndarray]:
    """Start the vision tower on clips; calling the result waits for their vectors [b, d].

    `encode` takes pixels [rows, T, S, S, 3] to frame tokens. With `joint`, the frames of a clip
    attend to each other, and all clips have one length. Otherwise clips of any length share a
    batch, which has `unit` times a power of two frames, so that few shapes are compiled.
    """
    b, lengths = len(clips), [len(clip) for clip in clips]
    if joint:
        tokens = batching.run_padded(encode, np.stack(clips))
        return lambda: _mean_vectors(np.asarray(tokens, np.float32)[:b])
    flat = np.concatenate(clips)[:, None]
    count = len(flat)
    if count < unit:
        rows = min(unit, batching.power_of_two(count))
    else:
        rows = unit * batching.power_of_two(-(-count // unit))
    tokens = encode(batching.padded(flat, rows))

    def wait() -> np.ndarray:
        frames = np.asarray(tokens, np.float32)[:count, 0]
        parts = np.split(frames, np.cumsum(lengths)[:-1])
        return np.concatenate([_mean_vectors(part[None]) for part in parts])

    return wait


def _mean_vectors(frames: np.ndarray) -> np.ndarray:
    """Average unit frame vectors [b, T, d] to unit vectors [b, d]."""
    return _unit(_unit(frames).mean(1))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)
