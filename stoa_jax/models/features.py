"""The features that the towers and the fusion encoder return.

Shapes: B clips, T frames, N trajectories, A actions, L text positions, S fusion positions,
Q positions whose outputs are read, d shared width.
"""

from typing import NamedTuple

from jax import Array


class VideoFeatures(NamedTuple):
    """Features of a batch of clips."""

    frames: Array  # [B, T, d]
    cls: Array  # [B, d], the mean of the frame tokens
    objects: Array  # [B, N, d]
    object_mask: Array  # [B, N]
    object_classes: Array  # [B, N], -1 for padding
    actions: Array  # [B, A, d]
    verbs: Array  # [B, N, d], of each trajectory; [B, 0, d] without `trajectory_verbs`
    adjectives: Array  # [B, N, d], of each trajectory; [B, 0, d] without `trajectory_adjectives`

    @property
    def trajectories(self) -> Array:
        """Trajectory tokens [B, N, d] as fusion reads them: the sum of all their projections."""
        more = (x for x in (self.verbs, self.adjectives) if x.shape[1])
        return sum(more, self.objects)


class VisionFeatures(NamedTuple):
    """Outputs of the vision tower for a batch of clips; constant while the tower is frozen."""

    frames: Array  # [B, T, d]
    taps: dict[str, Array]  # "block i" → output of that block [B, T, 1 + P, h], [CLS] first


class TextFeatures(NamedTuple):
    """Features of a batch of texts."""

    tokens: Array  # [B, L, d]
    sep: Array  # [B, d], the output at [SEP], which represents the whole text
    mask: Array  # [B, L]
    sep_index: Array  # [B]


class FusionPass(NamedTuple):
    """One sequence of the fusion encoder, S positions long."""

    x: Array  # [B, S, d]
    mask: Array  # [B, S, S], True where a position may attend
    read: Array  # [B, Q], positions whose outputs are needed


class Fused(NamedTuple):
    """Outputs of the fusion encoder for a whole text."""

    cls: Array  # [B, d], at the position of the clip token
    text: Array  # [B, L, d]
