"""Decoding in processes that may crash or hang; only the video in progress is lost.

The processes run this module, not the caller's script, so that a script needs no
`if __name__ == "__main__"` to add videos.
"""

import concurrent.futures
import os
import pickle
import selectors
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from stoa_jax.errors import UserError

TIMEOUT = 600.0  # seconds for one window; readers normally give up long before


class Decoders(Protocol):
    """Executor that runs functions on videos while the caller goes on."""

    def submit(self, function: Callable[..., Any], *args: Any) -> concurrent.futures.Future:
        """Run a function; any failure becomes a UserError of the result."""
        ...

    def close(self) -> None:
        """Stop; tasks that have not started are dropped."""


class Threads:
    """Decoders in threads of this process, for a few videos or detectors that cannot be pickled."""

    def __init__(self, count: int):
        self._pool = concurrent.futures.ThreadPoolExecutor(count, "stoa-decode")

    def submit(self, function: Callable[..., Any], *args: Any) -> concurrent.futures.Future:
        """Run a function in a thread; any exception becomes a UserError, as in a process."""
        return self._pool.submit(_guarded, function, *args)

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class Processes:
    """Decoders in separate processes; one that dies or hangs is replaced."""

    def __init__(self, count: int, timeout: float = TIMEOUT):
        self._pool = concurrent.futures.ThreadPoolExecutor(count, "stoa-decode")
        self._mine = threading.local()
        self._all: list[subprocess.Popen] = []
        self._timeout = timeout

    def submit(self, function: Callable[..., Any], *args: Any) -> concurrent.futures.Future:
        """Run an importable function in a process; its UserError is raised by the result."""
        return self._pool.submit(self._run, pickle.dumps((function, args)))

    def close(self) -> None:
        """Stop, and kill what is running."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in self._all:
            process.kill()
        self._pool.shutdown(wait=True)
        for process in self._all:
            process.communicate()

    def _run(self, task: bytes) -> Any:
        process = getattr(self._mine, "process", None)
        if process is None or process.poll() is not None:
            process = self._mine.process = _start()
            self._all.append(process)
        try:
            _send(process.stdin, task)
            ok, result = pickle.loads(_receive(process.stdout, self._timeout))
        except TimeoutError:
            process.kill()
            process.wait()  # otherwise the next task could still be given to it
            raise UserError(f"not decoded in {self._timeout:g} s; given up") from None
        except (EOFError, BrokenPipeError):
            code = process.wait()
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise UserError(f"the decoder crashed ({how})") from None
        if ok:
            return result
        raise UserError(result)


def _guarded(function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except UserError:
        raise
    except Exception as error:  # a failure of one video, also in a detector of the user
        raise UserError(f"{type(error).__name__}: {error}") from error


def _start() -> subprocess.Popen:
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(p for p in (package, os.environ.get("PYTHONPATH")) if p)
    return subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )


def _send(pipe, content: bytes) -> None:
    pipe.write(struct.pack("<Q", len(content)))
    pipe.write(content)
    pipe.flush()


def _receive(pipe, timeout: float | None = None) -> bytes:
    if timeout is not None:
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            if not selector.select(timeout):
                raise TimeoutError
    (size,) = struct.unpack("<Q", _exactly(pipe, 8))
    return _exactly(pipe, size)


def _exactly(pipe, size: int) -> bytes:
    content = pipe.read(size)
    if len(content) < size:
        raise EOFError
    return content


def _serve() -> None:
    """Run the functions that arrive through the pipe until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    tasks = sys.stdin.buffer
    results = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # keep output of libraries out of the pipe
    while True:
        try:
            function, args = pickle.loads(_receive(tasks))
        except EOFError:
            return
        try:
            answer = True, _guarded(function, *args)
        except UserError as error:
            answer = False, str(error)
        _send(results, pickle.dumps(answer, protocol=5))


if __name__ == "__main__":
    _serve()
