"""Embed videos into a store: resumable, in parallel, committed as it goes.

Decoders read windows ahead while the model encodes. A video's rows are committed together, so a
video that is in the index is there whole, and adding the same list again goes on where it ended.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from stoa_jax.errors import UserError
from stoa_jax.index.decoding import Decoders, Processes, Threads
from stoa_jax.index.encoder import Encoder
from stoa_jax.index.failures import Failures
from stoa_jax.index.reading import Source, plan, read
from stoa_jax.index.rows import Rows
from stoa_jax.index.segments import checked
from stoa_jax.index.store import Store
from stoa_jax.index.windows import Window

if TYPE_CHECKING:
    from stoa_jax.index.fusion import Fusion

COMMIT_SECONDS = 30.0
COMMIT_ROWS = 8192
ENCODE_WINDOWS = 32  # decoded windows that wait for the model
_FEW = 4  # videos that are not worth starting processes for

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Added:
    """What became of the videos of one `add`."""

    added: int
    skipped: int  # in the index already
    failed: int  # named, with the reason, in failures.jsonl


@dataclasses.dataclass
class _Job:
    """A video on its way: its windows arrive one by one."""

    source: Source
    expected: int = -1  # windows; -1 before they are known
    windows: list[Window | None] = dataclasses.field(default_factory=list)
    vectors: list[np.ndarray] = dataclasses.field(default_factory=list)
    features: list[np.ndarray] = dataclasses.field(default_factory=list)
    error: str = ""


def add(
    store: Store,
    encoder: Encoder,
    fusion: "Fusion | None",
    sources: Sequence[Source],
    *,
    progress: bool = False,
    shard: tuple[int, int] = (0, 1),
) -> Added:
    """Add the videos of one shard, those that are in the store already left out."""
    sources = sources[slice(*checked_shard(shard))]
    with store.writing("add"):
        known = store.videos_of([source.id for source in sources])
        for source in sources:
            held = known.get(source.id)
            if held is not None and source.path is not None and held != source.path:
                raise UserError(
                    f"{source.id!r}: the index holds this id for {held}, not for {source.path}; "
                    "give ids= of your own"
                )
        new = [source for source in sources if source.id not in known]
        failures = Failures(store.failures)
        failed = 0
        writer = _Writer(store, encoder.fingerprint, fusion is not None)
        with _decoders(new) as decoders, _bar(len(new), progress) as bar:
            for job in _encoded(_read(store, encoder, fusion, new, decoders), encoder, fusion):
                if job.error:
                    failed += 1
                    failures.record(job.source.id, job.source.path, job.error)
                    bar.set_postfix(failed=failed)
                else:
                    writer.take(job)
                bar.update()
            writer.flush()
        failures.finish({source.id for source in new})
        return Added(len(new) - failed, len(sources) - len(new), failed)


def checked_shard(shard: tuple[int, int]) -> tuple[int, None, int]:
    """Return the slice of the list of videos that a shard (I, N) is."""
    try:
        index, count = shard
        if 0 <= index < count:
            return index, None, count
    except (TypeError, ValueError):
        pass
    raise UserError(f"shard: {shard!r}; give (I, N) with I from 0 to N - 1")


class _Writer:
    """Collects finished videos and commits them now and then."""

    def __init__(self, store: Store, fingerprint: str, with_features: bool):
        self._store, self._fingerprint = store, fingerprint
        self._with_features = with_features
        self._jobs: list[_Job] = []
        self._rows = 0
        self._since = time.monotonic()

    def take(self, job: _Job) -> None:
        self._jobs.append(job)
        self._rows += len(job.windows)
        if self._rows >= COMMIT_ROWS or time.monotonic() - self._since >= COMMIT_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Commit all that was taken."""
        self._since = time.monotonic()
        if not self._jobs:
            return
        ids, videos, starts, ends = [], [], [], []
        for job in self._jobs:
            for window in job.windows:
                ids.append(job.source.id)
                videos.append(job.source.path)
                start, end = window or (None, None)
                starts.append(start)
                ends.append(end)
        vectors = np.stack([v for job in self._jobs for v in job.vectors])
        features = [f for job in self._jobs for f in job.features]
        self._store.append(
            Rows.of(ids, videos, starts, ends),
            checked(vectors, self._store.settings.dim, ids),
            np.stack(features) if self._with_features else None,
            fingerprint=self._fingerprint,
        )
        self._jobs, self._rows = [], 0


def _read(
    store: Store,
    encoder: Encoder,
    fusion: "Fusion | None",
    sources: Sequence[Source],
    decoders: Decoders,
) -> Iterator[tuple[_Job, Any]]:
    """Yield (job, prepared window) in order; None once for a job that failed before a window."""
    how = (encoder.preprocessing(),) + ((fusion.preprocessing,) if fusion else ())
    settings = store.settings
    depth = 2 * _cores()
    with contextlib.ExitStack() as files:

        def planned(source: Source) -> tuple[_Job, str, concurrent.futures.Future]:
            job = _Job(source)
            if not source.has_clock:
                return job, "", _done([None])
            path = source.video
            if isinstance(path, bytes):
                file = files.enter_context(tempfile.NamedTemporaryFile(suffix=".video"))
                file.write(path)
                file.flush()
                path = file.name
            task = plan, path, dataclasses.replace(source, video="", detections=None)
            return job, path, decoders.submit(*task, settings.segment, settings.stride)

        def reading() -> Iterator[tuple[_Job, concurrent.futures.Future | None]]:
            for job, path, future in _ahead(map(planned, sources), depth):
                try:
                    windows = future.result()
                    if not windows:
                        raise UserError("no segment in it")
                    if (
                        len(windows) > 1
                        and not isinstance(job.source.detections, str | os.PathLike | None)
                        and not callable(job.source.detections)
                    ):
                        raise UserError(
                            f"detections as arrays do not fit its {len(windows)} segments; give a "
                            "file of detections or a detector"
                        )
                except UserError as error:
                    job.error = str(error).replace(path, job.source.id) if path else str(error)
                    yield job, None
                    continue
                job.expected = len(windows)
                video = path if job.source.has_clock else job.source.video
                for window in windows:
                    if job.error:
                        break
                    job.windows.append(window)
                    yield (
                        job,
                        decoders.submit(read, video, window, job.source.detections, how),
                    )

        for job, future in _ahead(reading(), depth):
            if future is None:
                yield job, None
            elif not job.error:
                try:
                    yield job, future.result()
                except UserError as error:
                    job.error = str(error)
                    yield job, None


def _encoded(
    windows: Iterable[tuple[_Job, Any]], encoder: Encoder, fusion: "Fusion | None"
) -> Iterator[_Job]:
    """Yield jobs that are encoded to the end, and those that failed."""
    waiting: list[tuple[_Job, Any]] = []

    def encode() -> Iterator[_Job]:
        ready = [(job, prepared) for job, prepared in waiting if not job.error]
        waiting.clear()
        if not ready:
            return
        vectors = encoder.encode_video([prepared[0].pixels for _, prepared in ready])
        features = fusion.encode([prepared[1] for _, prepared in ready]) if fusion else None
        for row, (job, _) in enumerate(ready):
            job.vectors.append(vectors[row])
            if features is not None:
                job.features.append(features[row])
            if len(job.vectors) == job.expected:
                yield job

    for job, prepared in windows:
        if prepared is None:
            yield job
            continue
        waiting.append((job, prepared))
        if len(waiting) == ENCODE_WINDOWS:
            yield from encode()
    yield from encode()


def _ahead(tasks: Iterable[T], depth: int) -> Iterator[T]:
    """Yield tasks in order, `depth` of them started before the first is waited for."""
    queue: collections.deque[T] = collections.deque()
    for task in tasks:
        queue.append(task)
        if len(queue) > depth:
            yield queue.popleft()
    yield from queue


def _done(result: Any) -> concurrent.futures.Future:
    future: concurrent.futures.Future = concurrent.futures.Future()
    future.set_result(result)
    return future


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _decoders(sources: Sequence[Source]) -> Iterator[Decoders]:
    files = [s for s in sources if s.has_clock]
    picklable = all(isinstance(s.detections, str | os.PathLike | None) for s in sources)
    kind = Processes if len(files) > _FEW and picklable else Threads
    decoders: Decoders = kind(_cores())
    try:
        yield decoders
    finally:
        decoders.close()


def _bar(total: int, show: bool):
    from tqdm import tqdm

    return tqdm(total=total, desc="add", unit="video", disable=not show, dynamic_ncols=True)
