"""Embed videos on this machine: decoders prepare windows while the model encodes."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from stoa_jax.errors import UserError
from stoa_jax.index.decoding import Decoders, Processes, Threads
from stoa_jax.index.encoder import Encoder
from stoa_jax.index.reading import Source, plan, read
from stoa_jax.index.session import Added, Job, session
from stoa_jax.index.store import Store

if TYPE_CHECKING:
    from stoa_jax.index.fusion import Fusion
    from stoa_jax.inference.videos import Prepared

    Ways = tuple[Prepared, ...]  # one window, prepared for the towers and for the fusion encoder

ENCODE_WINDOWS = 32  # decoded windows waiting for the model
_FEW = 4  # for so few videos, no processes are started

T = TypeVar("T")


def add(
    store: Store,
    encoder: Encoder,
    fusion: "Fusion | None",
    sources: Sequence[Source],
    *,
    progress: bool = False,
    shard: tuple[int, int] = (0, 1),
) -> Added:
    """Add the videos of one shard, except those that are already in the store."""
    with session(store, encoder, sources[slice(*checked_shard(shard))], progress) as one:
        with _decoders(one.new) as decoders:
            for job in _encoded(_read(store, encoder, fusion, one.new, decoders), encoder, fusion):
                one.take(job)
        return one.finish()


def checked_shard(shard: tuple[int, int]) -> tuple[int, None, int]:
    """Return the slice of the list of videos for a shard (I, N)."""
    try:
        index, count = shard
        if 0 <= index < count:
            return index, None, count
    except (TypeError, ValueError):
        pass
    raise UserError(f"shard: {shard!r}; give (I, N) with I from 0 to N - 1")


def _read(
    store: Store,
    encoder: Encoder,
    fusion: "Fusion | None",
    sources: Sequence[Source],
    decoders: Decoders,
) -> "Iterator[tuple[Job, Ways | None]]":
    """Yield (job, prepared window) in order; None once for a job that failed before any window."""
    how = (encoder.preprocessing(),) + ((fusion.preprocessing,) if fusion else ())
    settings = store.settings
    depth = 2 * _cores()
    with contextlib.ExitStack() as files:

        def planned(source: Source) -> tuple[Job, str, concurrent.futures.Future]:
            job = Job(source)
            path = source.video
            if isinstance(path, bytes):
                file = files.enter_context(tempfile.NamedTemporaryFile(suffix=".video"))
                file.write(path)
                file.flush()
                path = file.name
            if not isinstance(path, str):
                return job, "", _done([None])  # frames are one segment
            task = plan, path, dataclasses.replace(source, video="", detections=None)
            return job, path, decoders.submit(*task, settings.segment, settings.stride)

        def reading() -> Iterator[tuple[Job, concurrent.futures.Future | None]]:
            for job, path, future in _ahead(map(planned, sources), depth):
                try:
                    windows = future.result()
                    if not windows:
                        raise UserError("the video contains no segment")
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
    windows: "Iterable[tuple[Job, Ways | None]]", encoder: Encoder, fusion: "Fusion | None"
) -> Iterator[Job]:
    """Yield jobs that are fully encoded, and those that failed."""
    waiting: list[tuple[Job, Ways]] = []

    def encode() -> Iterator[Job]:
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
    """Yield tasks in order, with `depth` of them started in advance."""
    queue: collections.deque[T] = collections.deque()
    for task in tasks:
        queue.append(task)
        if len(queue) > depth:
            yield queue.popleft()
    yield from queue


def _done(result: object) -> concurrent.futures.Future:
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
