"""Adding videos to a store: which are skipped, which failed, and regular commits.

A video's rows are committed together, so a video in the index is always complete, and adding the
same list again continues where it stopped.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence

import numpy as np

from stoa_jax.errors import UserError
from stoa_jax.index.encoder import Encoder
from stoa_jax.index.failures import Failures
from stoa_jax.index.reading import Source
from stoa_jax.index.rows import Rows
from stoa_jax.index.segments import checked
from stoa_jax.index.store import Store
from stoa_jax.index.windows import Window

COMMIT_SECONDS = 30.0
COMMIT_ROWS = 8192


@dataclasses.dataclass(frozen=True)
class Added:
    """The outcome of one `add`, in videos."""

    added: int
    skipped: int  # already in the index
    failed: int  # recorded with the reason in failures.jsonl


@dataclasses.dataclass
class Job:
    """A video in progress; its windows arrive one by one."""

    source: Source
    expected: int = -1  # windows; -1 before they are known
    windows: list[Window | None] = dataclasses.field(default_factory=list)
    vectors: list[np.ndarray] = dataclasses.field(default_factory=list)
    features: list[np.ndarray] = dataclasses.field(default_factory=list)
    error: str = ""


class Session:
    """Collector of finished videos, which commits those that are new to the store."""

    def __init__(self, store: Store, encoder: Encoder, sources: Sequence[Source], progress: bool):
        from tqdm import tqdm

        known = store.videos_of([source.id for source in sources])
        for source in sources:
            held = known.get(source.id)
            if held is not None and source.path is not None and held != source.path:
                raise UserError(
                    f"{source.id!r}: the index holds this id for {held}, not for {source.path}; "
                    "pass your own ids="
                )
        self.new = [source for source in sources if source.id not in known]
        self._store, self._fingerprint = store, encoder.fingerprint
        self._skipped = len(sources) - len(self.new)
        self._failures = Failures(store.failures)
        self._failed = 0
        self._jobs: list[Job] = []
        self._rows = 0
        self._since = time.monotonic()
        self.bar = tqdm(
            total=len(self.new), desc="add", unit="video", disable=not progress, dynamic_ncols=True
        )

    def take(self, job: Job) -> None:
        """Accept a video that is fully encoded, or that failed."""
        self.bar.update()
        if job.error:
            self._failed += 1
            self._failures.record(job.source.id, job.source.path, job.error)
            self.bar.set_postfix(failed=self._failed)
            return
        self._jobs.append(job)
        self._rows += len(job.windows)
        if self._rows >= COMMIT_ROWS or time.monotonic() - self._since >= COMMIT_SECONDS:
            self._commit()

    def finish(self) -> Added:
        """Commit the rest and return the outcome."""
        self._commit()
        self._failures.finish({source.id for source in self.new})
        return Added(len(self.new) - self._failed, self._skipped, self._failed)

    def _commit(self) -> None:
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
            np.stack(features) if self._store.settings.fusion else None,
            fingerprint=self._fingerprint,
        )
        self._jobs, self._rows = [], 0


@contextlib.contextmanager
def session(
    store: Store, encoder: Encoder, sources: Sequence[Source], progress: bool
) -> Iterator[Session]:
    """Hold the writer's lock while videos are added."""
    with store.writing("add"):
        one = Session(store, encoder, sources, progress)
        with one.bar:
            yield one
