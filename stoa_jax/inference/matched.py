"""Trajectories and actions of an explanation, with the words that they match.

Shapes: T frames, H and W patches of a frame.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Trajectory:
    """The objects of one class over time, and the noun that they were matched to."""

    name: str  # of the class
    boxes: np.ndarray  # [T, 4] xyxy as fractions of the frame, of the best object
    shown: np.ndarray  # [T] bool, whether the class has an object in the frame
    score: float  # the detector's mean confidence where it is shown
    word: str | None  # None: the no-match token Ø
    word_score: float  # softmax over the nouns and Ø


@dataclasses.dataclass(frozen=True, eq=False)
class Action:
    """One action query, the verb that it was matched to, and its attention."""

    word: str | None  # None: the no-match token Ø
    word_score: float  # softmax over the verbs and Ø
    attention: np.ndarray  # [T, H, W], weights of patches; with objects' they sum to 1
