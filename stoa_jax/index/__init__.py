"""The search index: segments of videos as vectors, searched exactly, changed all or nothing."""

__all__ = ["Added", "Hit", "Index"]


def __getattr__(name: str):
    # Imported when asked for: decoder processes import a module of this package and no more.
    if name in __all__:
        from stoa_jax.index import index

        return getattr(index, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
