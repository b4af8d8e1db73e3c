"""The store of an index: a directory is flat or Lance, an address is Lance."""

import os
from pathlib import Path
from typing import Any

from stoa_jax.errors import UserError

BACKENDS = ("flat", "lance")


def place(directory: str | os.PathLike[str]) -> Any:
    """Return a directory as a Path; return an address unchanged."""
    text = os.fspath(directory)
    return text if isinstance(text, str) and "://" in text else Path(text)


def backend(name: str) -> Any:
    """Return the store class of a backend's name."""
    if name == "flat":
        from stoa_jax.index.flat import FlatStore

        return FlatStore
    if name == "lance":
        from stoa_jax.index.lance import LanceStore

        return LanceStore
    raise UserError(f"backend: {name!r}; use {' or '.join(map(repr, BACKENDS))}")


def kind(where: Any) -> Any:
    """Return the store class of what is at a location; the flat store if nothing is there."""
    lance = isinstance(where, str) or (where / "settings.lance").exists()
    return backend("lance" if lance else "flat")


def open_store(directory: str | os.PathLike[str]) -> Any:
    """Open the store at a directory or an address."""
    where = place(directory)
    return kind(where)(where)
