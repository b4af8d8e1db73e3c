"""Training batches: the loader that the configuration names, and prefetching to the devices."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import jax
import numpy as np
from ml_collections import ConfigDict

if TYPE_CHECKING:
    from stoa_jax.tasks import Task


class Loader(Protocol):
    """An endless iterable of training batches; each process gets its own rows of every batch."""

    @property
    def steps_per_epoch(self) -> int:
        """The number of batches in one pass over the training examples."""
        ...

    def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]: ...


@runtime_checkable
class DeviceLoader(Loader, Protocol):
    """A loader that moves its batches to the devices itself, since it may keep frames there."""

    def to_devices(
        self, batch: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh
    ) -> dict[str, jax.Array]:
        """Assemble the global batch on a mesh."""
        ...


def make_loader(c: ConfigDict, task: "Task", start_step: int) -> Loader:
    """Open the training batches that the configuration names, starting at `start_step`."""
    from stoa_jax.data import pipeline

    if open_loader := getattr(task, "open_loader", None):
        return open_loader(start_step)
    sets = [(task.open_split(name, c.data.train_split), w) for name, w in c.data.sets]
    return pipeline.Loader(
        sets,
        task.batch_spec(train=True),
        batch_size=c.train.batch_size,
        seed=c.seed,
        train=True,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=c.data.workers,
        prefetch=c.data.prefetch,
        start_step=start_step,
        cache=c.data.cache,
    )


class Prefetch(Iterator[dict[str, jax.Array]]):
    """Batches on the devices, produced ahead of the loop by a background thread.

    `to_devices` moves one host batch to the devices; `ahead` batches are kept ready, and with 0 no
    thread is started. An error in the thread is raised by `next`.
    """

    def __init__(
        self,
        batches: Iterable[Mapping[str, np.ndarray]],
        to_devices: Callable[[Mapping[str, np.ndarray]], dict[str, jax.Array]],
        ahead: int,
    ):
        self._source, self._to_devices = batches, to_devices
        self._iterator = iter(batches)
        self._queue: queue.Queue[Any] = queue.Queue(max(ahead, 1))
        self._closed = threading.Event()
        self._thread = None
        if ahead > 0:
            self._thread = threading.Thread(target=self._fill, name="prefetch", daemon=True)
            self._thread.start()

    def __next__(self) -> dict[str, jax.Array]:
        if self._thread is None:
            return self._to_devices(next(self._iterator))
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def _fill(self) -> None:
        try:
            while not self._closed.is_set():
                self._put(self._to_devices(next(self._iterator)))
        except BaseException as error:  # also StopIteration; `__next__` raises it again
            self._put(error)

    def _put(self, item: Any) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(item, timeout=0.2)
            except queue.Full:
                continue

    def close(self) -> None:
        """Stop the thread, and close the loader if it can be closed."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
        close = getattr(self._source, "close", None)
        if close is not None:
            close()
