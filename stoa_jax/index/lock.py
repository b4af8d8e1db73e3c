"""The lock that lets only one writer at a time change an index, and names its holder."""

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from stoa_jax.errors import UserError

NAME = "lock"
_log = logging.getLogger(__name__)


class Locked(UserError):
    """Another writer holds the index."""


@contextlib.contextmanager
def writer_lock(directory: Path, action: str, wait: float = 5.0) -> Iterator[None]:
    """Hold the lock of an index; wait up to `wait` seconds for another writer to finish.

    The operating system releases the lock when its process ends, so a killed writer blocks
    nobody. Its name is still in the file, which tells the next writer that it was interrupted.
    """
    try:
        import fcntl
    except ImportError as error:
        raise UserError(
            f"{directory}: an index is written on Linux or macOS only; this system has no flock"
        ) from error
    path = directory / NAME
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{path}: cannot lock the index to write: {error.strerror}") from error
    try:
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise Locked(_held(directory, _holder(descriptor))) from None
                time.sleep(0.02)
            except OSError as error:
                raise UserError(
                    f"{path}: this file system does not lock files ({error.strerror}); "
                    "build the index on a local disk and copy it"
                ) from error
        previous = _holder(descriptor)
        if previous:
            _log.warning(
                "%s: process %s on %s was interrupted in %s (started %s); "
                "what it had committed is kept, the rest is removed",
                directory,
                *(previous.get(key, "?") for key in ("pid", "host", "action", "started")),
            )
        _record(
            descriptor,
            {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "action": action,
                "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            },
        )
        try:
            yield
        finally:
            _record(descriptor, {})
    finally:
        os.close(descriptor)


def _held(directory: Path, holder: dict) -> str:
    pid, host, action, started = (
        holder.get(key, "?") for key in ("pid", "host", "action", "started")
    )
    return (
        f"{directory}: process {pid} on {host} is writing to this index "
        f"({action}, since {started}); wait for it to finish or end it"
    )


def _holder(descriptor: int) -> dict:
    try:
        return dict(json.loads(os.pread(descriptor, 4096, 0) or b"{}"))
    except (ValueError, TypeError):
        return {}


def _record(descriptor: int, holder: dict) -> None:
    # Only informs other writers: a disk too full to store it must not prevent a deletion.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        if holder:
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
