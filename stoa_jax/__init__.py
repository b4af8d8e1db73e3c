"""STOA-VLP in JAX: video-language pre-training that knows objects and actions."""

__version__ = "0.1.0"
