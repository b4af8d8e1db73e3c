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
    if isinstance(where, Path) and not _holds_lance(where):
        from stoa_jax.index.flat import FlatStore

        return FlatStore(where)
    from stoa_jax.index.lance import LanceStore

    return LanceStore(where)


def exists(directory: str | os.PathLike[str]) -> bool:
    """Return whether there is a store of any backend."""
    where = location(directory)
    if isinstance(where, Path) and not _holds_lance(where):
        from stoa_jax.index.flat import FlatStore

        return FlatStore.exists(where)
    from stoa_jax.index.lance import LanceStore

    return LanceStore.exists(where)


def backend_of(directory: str | os.PathLike[str]) -> str:
    """Return the name of the backend of an existing store."""
    where = location(directory)
    return "lance" if isinstance(where, str) or _holds_lance(where) else "flat"


def _holds_lance(directory: Path) -> bool:
    return (directory / "settings.lance").exists()
