"""The store of an index: a directory is flat or Lance, an address is Lance."""

import os
from pathlib import Path

from stoa_jax.errors import UserError
from stoa_jax.index.manifest import Settings
from stoa_jax.index.store import Store

BACKENDS = ("flat", "lance")


def location(directory: str | os.PathLike[str]) -> Path | str:
    """Return a directory as a Path; return an address unchanged."""
    text = os.fspath(directory)
    return text if "://" in text else Path(text)


def create_store(directory: str | os.PathLike[str], backend: str, settings: Settings) -> Store:
    """Create an empty store of a backend at a directory or an address."""
    where = location(directory)
    if backend == "flat" and isinstance(where, Path):
        from stoa_jax.index.flat import FlatStore

        return FlatStore.create(where, settings)
    if backend == "flat":
        raise UserError(f"{where}: backend: 'flat' needs a directory; use 'lance' for an address")
    if backend == "lance":
        from stoa_jax.index.lance import LanceStore

        return LanceStore.create(where, settings)
    raise UserError(f"backend: {backend!r}; use {' or '.join(map(repr, BACKENDS))}")


def open_store(directory: str | os.PathLike[str]) -> Store:
    """Open the store at a directory or an address."""
    where = location(directory)
    if isinstance(where, Path) and backend_of(where) == "flat":
        from stoa_jax.index.flat import FlatStore

        return FlatStore(where)
    from stoa_jax.index.lance import LanceStore

    return LanceStore(where)


def exists(directory: str | os.PathLike[str]) -> bool:
    """Return whether there is a store of any backend."""
    where = location(directory)
    if isinstance(where, Path) and backend_of(where) == "flat":
        from stoa_jax.index.flat import FlatStore

        return FlatStore.exists(where)
    from stoa_jax.index.lance import LanceStore

    return LanceStore.exists(where)


def backend_of(directory: str | os.PathLike[str]) -> str:
    """Return the backend of a store; "flat" for a directory without one."""
    where = location(directory)
    lance = isinstance(where, str) or (where / "settings.lance").exists()
    return "lance" if lance else "flat"
