"""Training batches: those that the configuration names, and some of them on the devices ahead."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from stoa_jax.config import data_folder


def make_loader(c: ConfigDict, task: Any, start_step: int) -> Any:
    """The training batches that the configuration names."""
    from stoa_jax.data import pipeline

    folder = data_folder(c)
    sets = [(pipeline.open_split(folder, name, c.data.train_split), w) for name, w in c.data.sets]
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
    )


class Prefetch(Iterator[dict[str, jax.Array]]):
    """Batches on the devices, some ahead of the loop, made by a thread."""

    def __init__(self, batches: Iterable[Any], place: Callable[[Any], Any], ahead: int):
        self._source, self._place = batches, place
        self._iterator = iter(batches)
        self._queue: queue.Queue[Any] = queue.Queue(max(ahead, 1))
        self._closed = threading.Event()
        self._thread = None
        if ahead > 0:
            self._thread = threading.Thread(target=self._fill, name="prefetch", daemon=True)
            self._thread.start()

    def __next__(self) -> dict[str, jax.Array]:
        if self._thread is None:
            return self._place(next(self._iterator))
        found = self._queue.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def _fill(self) -> None:
        try:
            while not self._closed.is_set():
                self._put(self._place(next(self._iterator)))
        except BaseException as error:
            self._put(error)

    def _put(self, item: Any) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(item, timeout=0.2)
            except queue.Full:
                continue

    def close(self) -> None:
        """Stop the thread and the loader under it."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
        if hasattr(self._source, "close"):
            self._source.close()
