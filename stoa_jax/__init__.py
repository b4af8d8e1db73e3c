"""STOA-VLP in JAX: video-language pre-training that knows objects and actions."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stoa_jax.errors import UserError
    from stoa_jax.index import Added, Hit, Index
    from stoa_jax.inference.detections import load_detector
    from stoa_jax.inference.explain import Explanation
    from stoa_jax.inference.loading import load
    from stoa_jax.inference.matched import Action, Trajectory
    from stoa_jax.inference.model import Answer, Choice, Model
    from stoa_jax.inference.videos import Clip, Detections, Failure

__version__ = "0.1.0"

# Imported on first use, so that importing the package does not start JAX.
_LAZY = {
    "Action": "stoa_jax.inference.explain",
    "Added": "stoa_jax.index",
    "Answer": "stoa_jax.inference.model",
    "Choice": "stoa_jax.inference.model",
    "Clip": "stoa_jax.inference.videos",
    "Detections": "stoa_jax.inference.videos",
    "Explanation": "stoa_jax.inference.explain",
    "Failure": "stoa_jax.inference.videos",
    "Hit": "stoa_jax.index",
    "Index": "stoa_jax.index",
    "Model": "stoa_jax.inference.model",
    "Trajectory": "stoa_jax.inference.explain",
    "UserError": "stoa_jax.errors",
    "load": "stoa_jax.inference.loading",
    "load_detector": "stoa_jax.inference.detections",
}
__all__ = [
    "Action",
    "Added",
    "Answer",
    "Choice",
    "Clip",
    "Detections",
    "Explanation",
    "Failure",
    "Hit",
    "Index",
    "Model",
    "Trajectory",
    "UserError",
    "__version__",
    "load",
    "load_detector",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
