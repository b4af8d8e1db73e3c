"""Durable file operations: a file counts as written once it and its directory are synced.

All writes use `os.write`, `os.fsync` and `os.replace`, unbuffered and never a writable memory map,
so that a full disk raises `OSError` in the call instead of a signal later.
"""

import contextlib
import errno
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from stoa_jax.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write(path: Path, chunks: Iterable[bytes | memoryview]) -> int:
    """Write a new file, sync it, and return its size in bytes."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    size = 0
    try:
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            while view:
                written = os.write(descriptor, view[: 1 << 26])
                size += written
                view = view[written:]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return size


def write_array(
    path: Path, shape: tuple[int, ...], dtype: str, blocks: Iterable[np.ndarray]
) -> int:
    """Write blocks of rows as one .npy file, sync it, and return its size in bytes."""
    header = io.BytesIO()
    description = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(
        header, {"descr": description, "fortran_order": False, "shape": shape}
    )

    def chunks() -> Iterator[bytes | memoryview]:
        yield header.getvalue()
        for block in blocks:
            yield np.ascontiguousarray(block, dtype).view(np.uint8).reshape(-1).data

    return write(path, chunks())


def make_directory(path: Path) -> None:
    """Create a directory and sync its parent."""
    os.mkdir(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Sync the entries of a directory, so that new names in it survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, content: bytes) -> None:
    """Replace a file atomically: readers see the old content or the new, never a part."""
    temporary = path.with_name(f"{path.name}.tmp")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)  # left by a killed writer
    write(temporary, [content])
    os.replace(temporary, path)
    sync_directory(path.parent)


def remove_tree(path: Path) -> None:
    """Remove a directory of plain files; what cannot be removed now is left for the next writer."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(path)):
            os.unlink(entry.path)
        os.rmdir(path)


@contextlib.contextmanager
def clear_errors(directory: Path, action: str) -> Iterator[None]:
    """Turn errors of the operating system into one line that says what was not done."""
    try:
        yield
    except OSError as error:
        undone = f"{directory}: {action} was not committed, and the index is as it was before"
        if error.errno in _FULL:
            raise UserError(f"{undone}: {error.strerror}; free some space and repeat it") from error
        raise UserError(f"{undone}: {error.strerror} ({error.filename or directory})") from error
