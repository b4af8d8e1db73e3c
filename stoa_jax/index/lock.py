"""The lock that lets only one writer at a time change an index."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from stoa_jax import locks
from stoa_jax.errors import UserError

NAME = "lock"
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def writer_lock(directory: Path, action: str, wait: float = 5.0) -> Iterator[None]:
    """Hold the lock of an index; wait up to `wait` seconds for another writer to finish."""
    path = directory / NAME
    with contextlib.ExitStack() as stack:
        try:
            previous = stack.enter_context(locks.exclusive(path, action, wait))
        except locks.Unsupported as error:
            raise UserError(
                f"{path}: an index cannot be locked here ({error.strerror}); build it on a local "
                "disk on Linux or macOS, and copy it"
            ) from error
        except OSError as error:
            raise UserError(f"{path}: cannot lock the index to write: {error.strerror}") from error
        if previous:
            _log.warning(
                "%s: %s was interrupted in %s (started %s); what it had committed is kept, the "
                "rest is removed",
                directory,
                locks.described(previous),
                *(previous.get(key, "?") for key in ("action", "started")),
            )
        yield
