"""Embed videos with Ray Data: workers on one machine or many, and one process that commits.

If a worker dies, Ray starts another and gives it the same videos again. Videos that were
committed before are not embedded twice.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from stoa_jax.errors import UserError
from stoa_jax.index.reading import Source, plan, read, sources
from stoa_jax.index.rows import decoded, encoded
from stoa_jax.index.session import Added, Job

if TYPE_CHECKING:
    from stoa_jax.index.index import Index

VIDEOS_AT_ONCE = 4


@dataclasses.dataclass(frozen=True)
class Task:
    """Settings that every worker needs."""

    model: str  # where the workers load it from
    fingerprint: str
    segment: float | str
    stride: float
    fusion: bool


class Embedder:
    """A Ray actor that holds the model; one row of its results is one whole video."""

    def __init__(self, task: Task):
        from stoa_jax.index.fusion import Fusion
        from stoa_jax.inference.loading import load

        self._task = task
        self._model = load(task.model)
        if self._model.fingerprint != task.fingerprint:
            raise UserError(
                f"{task.model}: this worker loads a different model from that of the index"
            )
        self._fusion = Fusion(self._model) if task.fusion else None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list]:
        """Return windows, vectors and features of each video as bytes, or its failure."""
        rows = [self._embed(decoded(bytes(path))) for path in batch["path"]]
        return {
            "position": list(batch["position"]),
            **{name: [row[name] for row in rows] for name in rows[0]},
        }

    def _embed(self, path: str) -> dict[str, Any]:
        empty = {"windows": b"", "vectors": b"", "features": b"", "error": ""}
        how = (self._model.preprocessing(),)
        how += (self._fusion.preprocessing,) if self._fusion else ()
        try:
            source = Source(path, path)
            windows = plan(path, source, self._task.segment, self._task.stride)
            clips = [read(path, window, None, how) for window in windows]
            vectors = self._model.encode_video([clip[0].pixels for clip in clips])
            features = b""
            if self._fusion:
                features = self._fusion.encode([clip[1] for clip in clips]).tobytes()
        except UserError as error:
            return {**empty, "error": str(error)}
        return {
            "windows": np.array(windows, np.float64).tobytes(),
            "vectors": vectors.astype(np.float32).tobytes(),
            "features": features,
            "error": "",
        }


def add(
    index: "Index", model: str, videos: Sequence[str], *, workers: int = 2, progress: bool = False
) -> Added:
    """Add video files to an index opened with its model, embedded by `workers` Ray workers.

    `model` is the argument of `stoa_jax.load` in each worker, so every machine must be able to open
    it, and the videos too. Ray is started here unless it already runs (`ray.init`, RAY_ADDRESS).
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("this needs Ray: pip install 'ray[data]>=2.50,<2.61'") from error

    settings = index.settings
    with index.session(sources(videos, None), progress) as one:
        if not one.new:
            return one.finish()
        fingerprint = settings.fingerprint or ""
        task = Task(model, fingerprint, settings.segment, settings.stride, settings.fusion)
        data = ray.data.from_items(
            [{"position": i, "path": encoded(cast(str, s.video))} for i, s in enumerate(one.new)],
            override_num_blocks=min(len(one.new), max(workers, -(-len(one.new) // VIDEOS_AT_ONCE))),
        ).map_batches(
            Embedder,
            fn_constructor_args=[task],
            batch_size=VIDEOS_AT_ONCE,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(one.new))),
        )
        for row in data.iter_rows():
            one.take(_job(one.new[row["position"]], row, settings.dim))
        return one.finish()


def _job(source: Source, row: dict[str, Any], dim: int) -> Job:
    windows = np.frombuffer(row["windows"]).reshape(-1, 2)
    job = Job(source, len(windows), error=row["error"])
    job.windows = [(float(start), float(end)) for start, end in windows]
    job.vectors = list(np.frombuffer(row["vectors"], np.float32).reshape(-1, dim))
    features = np.frombuffer(row["features"], np.float16)
    if len(features):
        job.features = list(features.reshape(len(windows), -1))
    return job
