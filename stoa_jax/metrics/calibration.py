"""Calibration of match probabilities: temperature, calibration error, threshold. NumPy, float64.

A pair's margin is its log-odds of a match: the match head's second logit less its first. The
calibrated probability is `sigmoid(margin / temperature)`.
"""

import numpy as np
from numpy.typing import ArrayLike

from stoa_jax.errors import UserError

COLDEST, HOTTEST = 0.01, 100.0  # bounds of the temperature


def match_probability(margins: ArrayLike, temperature: float = 1.0) -> np.ndarray:
    """Return the probabilities of a match, in float64."""
    scaled = np.asarray(margins, np.float64) / temperature
    # Both branches of sigmoid without overflow.
    small = np.exp(-np.abs(scaled))
    return np.where(scaled >= 0, 1 / (1 + small), small / (1 + small))


def softmax(scores: ArrayLike) -> np.ndarray:
    """Return the softmax of scores over the last axis, in float64."""
    scores = np.asarray(scores, np.float64)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def even_weights(matches: ArrayLike) -> np.ndarray:
    """Return weights that give matches and mismatches the same total, 1/2 each."""
    matches = _both_kinds(matches)
    count = matches.sum()
    return np.where(matches, 0.5 / count, 0.5 / (len(matches) - count))


def fit_temperature(
    margins: ArrayLike, matches: ArrayLike, weights: ArrayLike | None = None
) -> float:
    """Return the temperature with the least weighted log loss, between 0.01 and 100.

    The loss is convex in the inverse temperature, so its slope is bisected. Margins that separate
    the pairs without error give 0.01; margins that are no better than chance give 100.
    """
    matches = _both_kinds(matches)
    margins = np.asarray(margins, np.float64)
    _check_finite(margins, len(matches))
    weights = np.ones(len(matches)) if weights is None else np.asarray(weights, np.float64)

    def slope(inverse: float) -> float:
        error = match_probability(margins * inverse) - matches
        return float(np.sum(weights * error * margins))

    low, high = 1 / HOTTEST, 1 / COLDEST
    if slope(low) >= 0:
        return HOTTEST
    if slope(high) <= 0:
        return COLDEST
    for _ in range(100):
        middle = np.sqrt(low * high)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return float(1 / np.sqrt(low * high))


def expected_calibration_error(
    probabilities: ArrayLike, matches: ArrayLike, weights: ArrayLike | None = None, bins: int = 15
) -> float:
    """Return the mean distance of probability and frequency of a match, over equal-width bins."""
    probabilities = np.asarray(probabilities, np.float64)
    matches = np.asarray(matches, bool)
    _check_finite(probabilities, len(matches))
    weights = np.ones(len(matches)) if weights is None else np.asarray(weights, np.float64)
    bin_of = np.minimum((probabilities * bins).astype(int), bins - 1)
    gap = np.bincount(bin_of, weights * (probabilities - matches), bins)
    return float(np.abs(gap).sum() / weights.sum())


def threshold_at(mismatches: ArrayLike, false_accept_rate: float) -> float:
    """Return the least threshold that accepts at most this share of the mismatches' probabilities.

    A probability at or above the threshold is accepted.
    """
    if not 0 <= false_accept_rate < 1:
        raise UserError(
            f"calibration: the rate of false accepts is {false_accept_rate}; "
            "it must be at least 0 and below 1"
        )
    ordered = np.sort(np.asarray(mismatches, np.float64))[::-1]
    if not len(ordered):
        raise UserError("calibration: no mismatched pairs to choose a threshold on")
    _check_finite(ordered, len(ordered))
    allowed = int(np.floor(false_accept_rate * len(ordered)))
    return float(np.nextafter(ordered[allowed], np.inf))


def _both_kinds(matches: ArrayLike) -> np.ndarray:
    matches = np.asarray(matches, bool)
    if matches.all() or not matches.any():
        raise UserError(
            f"calibration: {int(matches.sum())} of {len(matches)} pairs match; "
            "it takes some that match and some that do not"
        )
    return matches


def _check_finite(values: np.ndarray, count: int) -> None:
    if values.shape != (count,):
        raise UserError(f"calibration: values of shape {list(values.shape)} for {count} pairs")
    if not np.isfinite(values).all():
        raise UserError(f"calibration: {int((~np.isfinite(values)).sum())} values are not finite")
