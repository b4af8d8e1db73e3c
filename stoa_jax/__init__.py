"""STOA-VLP in JAX: video-language pre-training that knows objects and actions."""

__version__ = "0.1.0"
__all__ = ["Index", "__version__", "load"]


def __getattr__(name: str):
    # Imported when asked for: most uses of the package need no jax to be started.
    if name == "load":
        from stoa_jax.inference.loading import load

        return load
    if name == "Index":
        from stoa_jax.index import Index

        return Index
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
