"""Inference: open weights, encode clips and texts, export programs."""
