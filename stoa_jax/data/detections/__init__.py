"""Detect objects, read detections in four formats, and match them to the frames of a clip."""

from stoa_jax.data.detections.matching import Detections, align, distinct, open_detections

__all__ = ["Detections", "align", "distinct", "open_detections"]
