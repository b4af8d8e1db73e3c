"""Processes that encode clips and can be replaced.

A decoder can crash its process or never return. So each clip is given to one process that is
watched: if the process dies or takes too long, the clip has failed and a new process continues.
"""

import collections
import dataclasses
import itertools
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Generator, Hashable, Iterable, Iterator
from multiprocessing import connection
from typing import Any

from stoa_jax.data import builders, records
from stoa_jax.data.sources import Source
from stoa_jax.errors import UserError

Key = Hashable
START_SECONDS = 600.0  # for imports, loading the tagger and opening the source


@dataclasses.dataclass(frozen=True)
class Job:
    """What every process needs."""

    dataset: str
    source: Source  # without its splits: the entries are sent one by one
    settings: builders.Settings


@dataclasses.dataclass(frozen=True)
class Result:
    """One clip, encoded or failed."""

    record: bytes = b""
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    objects: int = 0
    error: str = ""


class _Worker:
    """A process, and the clips that it was given and has not answered."""

    def __init__(self, job: bytes):
        context = multiprocessing.get_context("spawn")  # a fork would copy the caller's threads
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_run, args=(theirs, job), daemon=True)
        self.process.start()
        theirs.close()
        self.ready = False
        self.drained = False  # its end of the pipe is closed, and everything it sent was read
        self.waiting: collections.deque[Key] = collections.deque()
        self.since = time.monotonic()

    def give(self, tasks: list[tuple[Key, Any]]) -> None:
        """Send tasks, only to a process that waits; otherwise both could block on full pipes."""
        self.waiting.extend(key for key, _ in tasks)
        self.since = time.monotonic()
        self.pipe.send(tasks)

    def end(self) -> None:
        """Kill the process; one that hangs may ignore gentler signals."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def encode_all(
    job: Job, entries: Iterable[tuple[Key, Any]], total: int, processes: int, timeout: float
) -> Generator[tuple[Key, Result]]:
    """Encode (key, entry) pairs in parallel; yield (key, result) in any order.

    `entries` is read as processes become free. `total` is the number of entries.
    """
    packed = pickle.dumps(job)
    stream, returned = iter(entries), collections.deque()
    chunk = max(1, min(8, total // (4 * processes)))
    given: dict[Key, Any] = {}
    workers = [_Worker(packed) for _ in range(min(processes, total))]
    left = total
    try:
        while left:
            for worker in workers:
                if worker.ready and not worker.waiting:
                    tasks = _draw(returned, stream, chunk)
                    given.update(tasks)
                    _give(worker, tasks)
            connection.wait([worker.pipe for worker in workers], timeout=1.0)
            for place, worker in enumerate(workers):
                for key, result in _received(worker):
                    del given[key]
                    left -= 1
                    yield key, result
                error = _broken(worker, timeout)
                if not error:
                    continue
                if not worker.ready:
                    raise UserError(f"a build process could not start: {error}")
                worker.end()
                if worker.waiting:
                    key = worker.waiting.popleft()
                    del given[key]
                    left -= 1
                    yield key, Result(error=error)
                    returned.extend((key, given.pop(key)) for key in worker.waiting)
                workers[place] = _Worker(packed)
    finally:
        for worker in workers:
            worker.end()


def _draw(
    returned: collections.deque[tuple[Key, Any]], stream: Iterator[tuple[Key, Any]], count: int
) -> list[tuple[Key, Any]]:
    """Take the tasks that a dead process left first, then new ones."""
    tasks = [returned.popleft() for _ in range(min(count, len(returned)))]
    return tasks + list(itertools.islice(stream, count - len(tasks)))


def _give(worker: _Worker, tasks: list[tuple[Key, Any]]) -> None:
    if not tasks:
        return
    try:
        worker.give(tasks)
    except (BrokenPipeError, ConnectionResetError):
        pass  # the process has died; _broken detects it and its tasks come back


def _received(worker: _Worker) -> Iterator[tuple[Key, Result]]:
    while True:
        try:
            if not worker.pipe.poll():
                return
            message = worker.pipe.recv()
        except (EOFError, OSError):
            worker.drained = True
            return
        worker.since = time.monotonic()
        if isinstance(message, str):
            if message:
                raise UserError(message)
            worker.ready = True
        else:
            worker.waiting.popleft()
            yield message


def _broken(worker: _Worker, timeout: float) -> str:
    """Return why a process must be replaced, or "" if it need not be."""
    if not worker.process.is_alive():
        if not worker.drained:
            return ""  # results that it sent before it died are still to be read
        code = worker.process.exitcode or 0
        if code < 0:
            name = signal.Signals(-code).name
            memory = "; the machine may be out of memory" if name == "SIGKILL" else ""
            return f"the decoder crashed ({name}{memory})"
        return f"the decoder ended its process (exit code {code})"
    idle = worker.ready and not worker.waiting
    limit = timeout if worker.ready else START_SECONDS
    if not idle and time.monotonic() - worker.since > limit:
        return f"not decoded in {limit:g} s; given up"
    return ""


def _run(pipe: connection.Connection, packed: bytes) -> None:
    """Encode the clips that arrive through the pipe until it closes; runs in its own process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import cv2

    cv2.setNumThreads(1)  # the processes provide the parallelism
    try:
        job: Job = pickle.loads(packed)
        parse = builders.make_parse(job.settings.tagger)
        spec = records.features(job.settings.frames, job.settings.objects)
    except Exception as error:  # the boundary of a process: the parent raises the reason
        pipe.send(builders.reason(error))
        return
    pipe.send("")
    while True:
        try:
            tasks = pipe.recv()
        except EOFError:
            return
        for key, entry in tasks:
            pipe.send((key, _encode(job, spec, parse, entry)))


def _encode(job: Job, spec: Any, parse: records.Parse, entry: Any) -> Result:
    try:
        encoded = builders.load_example(job.source, entry, job.settings, parse)
        example = encoded.example
        metadata = {
            "video_id": example["video_id"].decode(),
            "texts": [text.decode() for text in example["texts"]],
            "answers": [answer.decode() for answer in example["answers"]],
        }
        objects = int((example["classes"] >= 0).sum())
        record = records.serialize(spec, example)
        return Result(record, metadata, tuple(encoded.dropped), objects)
    except Exception as error:  # one bad clip must not end the build; `failures.jsonl` names it
        return Result(error=builders.reason(error))


def _end_with_parent() -> None:
    # Also works if the parent was killed, or while a decoder hangs in this process.
    parent = multiprocessing.parent_process()
    assert parent is not None  # only runs in worker processes
    connection.wait([parent.sentinel])
    os._exit(1)
