"""STOA-VLP in JAX: video-language pre-training that knows objects and actions."""

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str):
    # Imported when asked for: most uses of the package need no jax to be started.
    if name == "load":
        from stoa_jax.inference.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
