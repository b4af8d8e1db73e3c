"""Locks on files: one process at a time holds one, and others learn which process that is."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from stoa_jax.errors import UserError

Holder = Mapping[str, object]  # pid, host, action, started


class Locked(UserError):
    """Another process holds the lock."""


class Unsupported(OSError):
    """The system or the file system has no locks."""


@contextlib.contextmanager
def exclusive(path: Path, action: str, wait: float = 5.0) -> Iterator[Holder]:
    """Hold the lock file `path`; wait up to `wait` seconds for another process to release it.

    Yield the previous holder if it was killed while it held the lock, else nothing. The operating
    system releases the lock when its process ends, so a killed process blocks nobody. Its name is
    still in the file, which tells the next one that it was interrupted.

    Raises Locked, Unsupported, or OSError if the file cannot be opened.
    """
    try:
        import fcntl
    except ImportError as error:
        raise Unsupported(None, "this system has no flock") from error
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise Locked(_held(path.parent, _holder(descriptor))) from None
                time.sleep(0.02)
            except OSError as error:
                raise Unsupported(error.errno, error.strerror) from error
        previous = _holder(descriptor)
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
            yield previous
        finally:
            _record(descriptor, {})
    finally:
        os.close(descriptor)


def described(holder: Holder) -> str:
    """Return who holds or held a lock: process, host."""
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"


def _held(directory: Path, holder: Holder) -> str:
    action, started = holder.get("action", "?"), holder.get("started", "?")
    return (
        f"{directory}: {described(holder)} is writing to it ({action}, since {started}); "
        "wait for it to finish or end it"
    )


def _holder(descriptor: int) -> Holder:
    try:
        return dict(json.loads(os.pread(descriptor, 4096, 0) or b"{}"))
    except (ValueError, TypeError):
        return {}


def _record(descriptor: int, holder: Holder) -> None:
    # Only informs others: a disk too full to store it must not prevent a deletion.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        if holder:
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
