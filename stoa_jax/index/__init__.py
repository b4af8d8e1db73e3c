"""The search index: segments of videos as vectors, searched exactly and changed atomically."""

__all__ = ["Added", "Hit", "Index"]


def __getattr__(name: str):
    # Imported on first use: decoder processes import only one module of this package.
    if name in __all__:
        from stoa_jax.index import index

        return getattr(index, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
