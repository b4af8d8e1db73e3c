"""The search index over segments of videos: `stoa_jax.Index`.

The file is long because every public method is documented here with an example; stores, reading and
encoding have their own modules.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self, cast

import numpy as np

from stoa_jax.errors import UserError
from stoa_jax.index import adding, backends, encoder, reading, segments, windows
from stoa_jax.index.encoder import Encoder
from stoa_jax.index.manifest import Settings
from stoa_jax.index.rows import Row, Rows
from stoa_jax.index.session import Added, Session, session
from stoa_jax.index.store import Store

if TYPE_CHECKING:
    from stoa_jax.index.fusion import Fusion
    from stoa_jax.inference.videos import Clip, Video

    Query = str | Video | Clip | Sequence[float]  # a text, a video, or a vector

RERANKED = 50  # default number of candidates that the fusion encoder re-ranks for a text


@dataclasses.dataclass(frozen=True)
class Hit:
    """A segment that a search found."""

    id: str
    video: str | None  # the file; None if the index was not given one
    start: float | None  # seconds
    end: float | None
    score: float  # the cosine: the inner product of unit vectors
    probability: float | None  # by the fusion encoder; None without re-ranking
    matched: bool | None  # whether `probability` reaches the threshold of the index


class Index:
    """Segments of videos as vectors, searched exactly and changed atomically.

    An opened index keeps the state in which it was opened, regardless of other writers. It sees
    what is written through it.
    """

    def __init__(self, store: Store, model: Encoder | None = None):
        self._store: Store | None = store
        self._model = model
        self._fusion: Fusion | None = None
        if model is not None:
            settings = store.settings
            encoder.check_fingerprint(store.place, settings.fingerprint, len(store), model)
            self._fusion = _fusion(model) if settings.fusion else None

    @classmethod
    def create(
        cls,
        directory: str | os.PathLike[str],
        model: Encoder | None = None,
        *,
        dim: int | None = None,
        segment: float | str = 10.0,
        stride: float = 5.0,
        backend: str = "flat",
        fusion: bool = False,
    ) -> Self:
        """Create an empty index for the vectors of a model, or for any of width `dim`.

        A video is cut into windows of `segment` seconds, one every `stride` seconds, or into shots
        with `segment="scene"`. `fusion` stores the fusion encoder's input for each segment, so that
        `search` can re-rank by probability without decoding.

        >>> stoa_jax.Index.create("films", model, segment=4, stride=2, fusion=True)
        <stoa_jax index 'films': 0 segments>
        """
        windows.check(segment, stride)
        if model is None and dim is None:
            raise UserError("Index.create: pass a model, or dim= for your own vectors")
        if model is not None:
            width = encoder.dimensions(model)
            if dim not in (None, width):
                raise UserError(f"Index.create: dim={dim}, and the model's vectors have {width}")
            dim = width
        if not isinstance(dim, int) or dim < 1:
            raise UserError(f"Index.create: dim={dim!r}; give a width of 1 or more")
        if fusion:
            if model is None:
                raise UserError("Index.create: fusion=True needs a model with a match head")
            _fusion(model)
        settings = Settings(
            dim,
            segment if isinstance(segment, str) else float(segment),
            float(stride),
            fusion,
            None if model is None else model.fingerprint,
            getattr(model, "source", None) or None,
        )
        return cls(backends.create_store(directory, backend, settings), model)

    @classmethod
    def open(cls, directory: str | os.PathLike[str], model: Encoder | None = None) -> Self:
        """Open an index as its last commit left it; without a model, only for vectors.

        >>> stoa_jax.Index.create("films", dim=2).close()
        >>> with stoa_jax.Index.open("films") as index:
        ...     len(index)
        0
        """
        return cls(backends.open_store(directory), model)

    @staticmethod
    def merge(
        directory: str | os.PathLike[str],
        parts: Sequence[str | os.PathLike[str]],
        *,
        backend: str | None = None,
    ) -> "Index":
        """Add the rows of other indexes to one, new or existing, in one commit.

        A new one has the backend of the first part by default; flat indexes can be merged into one
        of any backend.

        >>> for part in ("a", "b"):
        ...     with stoa_jax.Index.create(part, dim=2) as index:
        ...         index.add_vectors([[1, 0]], [f"clip of {part}"])
        >>> stoa_jax.Index.merge("both", ["a", "b"]).ids()
        ['clip of a', 'clip of b']
        """
        if isinstance(parts, str | os.PathLike):
            raise UserError("Index.merge takes a list of indexes; put a single index in a list")
        if not parts:
            raise UserError("Index.merge: the list of indexes is empty")
        target, *real = (
            place if isinstance(place, str) else os.path.realpath(place)
            for place in map(backends.location, (directory, *parts))
        )
        for position, part in enumerate(real):
            if part == target:
                raise UserError(f"Index.merge: {parts[position]} is the target of the merge")
            if part in real[:position]:
                raise UserError(f"Index.merge: {parts[position]} is listed twice")
        stores = [backends.open_store(part) for part in parts]
        if backends.exists(directory):
            store = backends.open_store(directory)
        else:
            settings = dataclasses.replace(stores[0].settings, threshold=None, threshold_note="")
            backend = backend or backends.backend_of(parts[0])
            store = backends.create_store(directory, backend, settings)
        store.merge(stores)
        return Index(store)

    @property
    def settings(self) -> Settings:
        """Width, segment, stride, fingerprint and threshold."""
        return self._opened.settings

    @property
    def searched_by(self) -> str:
        """The library that compares a query with the vectors, with its version."""
        return self._opened.searched_by

    @property
    def _opened(self) -> Store:
        if self._store is None:
            raise UserError("this index was closed; open it again")
        return self._store

    def __len__(self) -> int:
        return len(self._opened)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._store is None:
            return "<stoa_jax index, closed>"
        return f"<stoa_jax index {self._store.place!r}: {len(self._store)} segments>"

    def ids(self) -> list[str]:
        """Return each id once, in the order of addition.

        >>> index = stoa_jax.Index.create("films", dim=2)
        >>> index.add_vectors([[1, 0], [0, 1]], ["a", "a"], starts=[0, 5])
        >>> index.ids(), len(index)
        (['a'], 2)
        """
        return self._opened.ids()

    def videos(self) -> dict[str, str | None]:
        """Return the file of each id; None if the index was not given one.

        >>> index = stoa_jax.Index.create("films", dim=2)
        >>> index.add_vectors([[1, 0]], ["a"])
        >>> index.videos()
        {'a': None}
        """
        return self._opened.videos_of(self.ids())

    def close(self) -> None:
        """Release the files; everything written is already committed.

        >>> index = stoa_jax.Index.create("films", dim=2)
        >>> index.close()
        """
        self._store = None

    def add(
        self,
        videos: "Sequence[Video | Clip]",
        ids: Sequence[str] | None = None,
        *,
        progress: bool = False,
        shard: tuple[int, int] = (0, 1),
    ) -> Added:
        """Embed videos and add their segments; videos whose id is already present are skipped.

        Without `ids` a file's id is its path as given, and another video's a hash of its content.
        `shard=(I, N)` takes every N-th video from the I-th on. A video that fails is recorded in
        `failures.jsonl` with the reason, and tried again by the next `add` of it.

        >>> index = stoa_jax.Index.create("films", model)
        >>> index.add(["example.mp4", "no.mp4"])
        Added(added=1, skipped=0, failed=1)
        """
        model = self._needs_model("add")
        found = reading.sources(videos, ids)
        return adding.add(self._opened, model, self._fusion, found, progress=progress, shard=shard)

    def session(
        self, sources: Sequence[reading.Source], progress: bool = False
    ) -> contextlib.AbstractContextManager[Session]:
        """Hold the writer's lock and accept videos that were encoded elsewhere."""
        return session(self._opened, self._needs_model("add"), sources, progress)

    def add_vectors(
        self,
        vectors: np.ndarray,
        ids: Sequence[str],
        starts: Sequence[float | None] | np.ndarray | None = None,
        ends: Sequence[float | None] | np.ndarray | None = None,
        fingerprint: str | None = None,
    ) -> None:
        """Add your own vectors [n, d] in one commit, with the fingerprint of their model.

        A vector is identified by its id and start; an existing one raises UserError.

        >>> index = stoa_jax.Index.create("films", dim=2)
        >>> index.add_vectors(np.eye(2), ["a", "b"], fingerprint="my model, version 1")
        """
        store = self._opened
        settings = store.settings
        if settings.fusion:
            raise UserError(
                f"{store.place}: it stores fusion features, which vectors alone lack; use add, or "
                "create an index without fusion"
            )
        rows = Rows.of(ids, None, starts, ends)
        checked = segments.checked(vectors, settings.dim, ids)
        if len(checked) != len(rows):
            raise UserError(f"add_vectors: {len(checked)} vectors and {len(rows)} ids")
        held = settings.fingerprint
        if fingerprint is None and self._model is not None:
            fingerprint = self._model.fingerprint
        if held is not None and fingerprint != held:
            raise UserError(
                f"{store.place}: it holds vectors of model {held}, and these are of "
                f"{fingerprint or 'an unnamed model'}: scores of two models do not "
                "compare; pass fingerprint= of the model that made them"
            )
        store.append(rows, checked, fingerprint=fingerprint)

    def search(self, query: "Query", k: int = 10, *, rerank: bool | int | None = None) -> list[Hit]:
        """Return the `k` best segments for a text, a video, or a vector [d].

        The search compares all segments, exactly. If the index stores fusion features, a text's
        best candidates are then ordered by their match probability; `rerank` is their number
        (False: none).

        >>> index = stoa_jax.Index.create("films", model, fusion=True)
        >>> index.add([clip], ["shapes"])
        Added(added=1, skipped=0, failed=0)
        >>> hit = index.search("a triangle moves", k=1)[0]
        >>> hit.id, hit.start, 0 <= hit.probability <= 1
        ('shapes', 0.0, True)
        """
        _check_k(k)
        candidates = self._candidates(query, k, rerank)
        vector = self._vector(query)
        (found,) = self._opened.search(vector, max(k, candidates))
        rows = Rows(found.rows)
        probabilities: Sequence[float | None] = [None] * len(rows)
        if candidates and len(rows):
            assert self._fusion is not None and isinstance(query, str)
            probabilities = self._fusion.match(self._opened.features(found), query).tolist()
        hits = [
            self._hit(rows[i], float(found.scores[i]), probabilities[i]) for i in range(len(rows))
        ]
        if candidates:
            hits.sort(key=lambda hit: -(hit.probability or 0.0))  # stable: ties stay by score
        return hits[:k]

    def search_vectors(
        self, queries: np.ndarray, k: int = 10
    ) -> tuple[list[list[str]], np.ndarray]:
        """Return the ids of the `k` best segments for each query [q, d], and their scores [q, k].

        Both are shorter if the index has fewer segments.

        >>> index = stoa_jax.Index.create("films", dim=2)
        >>> index.add_vectors(np.eye(2), ["a", "b"])
        >>> ids, scores = index.search_vectors([[0.6, 0.8]], k=2)
        >>> ids, scores.round(1).tolist()
        ([['b', 'a']], [[0.800000011920929, 0.6000000238418579]])
        """
        _check_k(k)
        found = self._opened.search(self._checked(queries), k)
        width = min(k, len(self))
        scores = np.empty((len(found), width), np.float32)
        for row, one in enumerate(found):
            scores[row] = one.scores
        return [one.ids for one in found], scores

    def delete(self, ids: Sequence[str]) -> int:
        """Delete all segments of some ids in one commit, and return how many there were.

        An unknown id raises UserError, and nothing is deleted.

        >>> index = stoa_jax.Index.create("films", dim=2)
        >>> index.add_vectors(np.eye(2), ["a", "b"])
        >>> index.delete(["a"])
        1
        """
        return self._opened.delete([ids] if isinstance(ids, str) else list(ids))

    def compact(self) -> None:
        """Rewrite the index without deleted rows, as one segment; readers are not disturbed.

        >>> index = stoa_jax.Index.create("films", dim=2)
        >>> index.add_vectors(np.eye(2), ["a", "b"])
        >>> index.delete(["a"])
        1
        >>> index.compact()
        """
        self._opened.compact()

    def calibrate(self, texts: Sequence[str], *, rate: float = 0.05) -> float:
        """Set the threshold of `Hit.matched` from texts that nothing in the index answers.

        At the threshold, at most `rate` of such texts find a match anywhere in the index (by the
        conformal quantile, which needs at least 1 / rate - 1 texts). Measure it again when the
        index has grown much.

        >>> index = stoa_jax.Index.create("films", model, fusion=True)
        >>> index.add([clip], ["shapes"])
        Added(added=1, skipped=0, failed=0)
        >>> threshold = index.calibrate(["a zebra drinks", "two boats race"], rate=0.4)
        >>> any(hit.matched for hit in index.search("a zebra drinks"))
        False
        """
        store, texts = self._opened, list(texts)
        if self._fusion is None:
            raise UserError(f"{store.place}: an index without fusion features has no probabilities")
        if not 0 < rate < 1:
            raise UserError(f"calibrate: rate={rate!r}; give a fraction between 0 and 1")
        rank = math.ceil((len(texts) + 1) * (1 - rate))
        if rank > len(texts):
            raise UserError(
                f"calibrate: {len(texts)} texts cannot show a rate of {rate:g}; give at least "
                f"{math.ceil(1 / rate) - 1}"
            )
        best = []
        for text in texts:
            hits = self.search(text, 1, rerank=RERANKED)
            best.append(hits[0].probability or 0.0 if hits else 0.0)
        threshold = float(np.nextafter(sorted(best)[rank - 1], math.inf))
        store.set(
            threshold=threshold,
            threshold_note=f"{rate:g} false accepts a query, by {len(texts)} texts that nothing "
            f"among {len(store)} segments answers",
        )
        return threshold

    def _candidates(self, query: "Query", k: int, rerank: bool | int | None) -> int:
        """Return the number of candidates to re-rank; 0 for none."""
        if rerank is None:
            rerank = self._fusion is not None and isinstance(query, str)
        if not rerank:
            return 0
        if self._fusion is None:
            raise UserError(
                f"{self._opened.place}: rerank needs an index created with fusion=True and opened "
                "with its model"
            )
        if not isinstance(query, str):
            raise UserError("search: only a text is re-ranked; pass rerank=False for this query")
        return max(k, RERANKED if rerank is True else int(rerank))

    def _hit(self, row: Row, score: float, probability: float | None) -> Hit:
        matched = None
        if probability is not None:
            threshold = self._opened.settings.threshold
            if threshold is None:
                assert self._fusion is not None
                threshold = self._fusion.threshold
            matched = None if threshold is None else probability >= threshold
        return Hit(row.id, row.video, row.start, row.end, score, probability, matched)

    def _needs_model(self, call: str) -> Encoder:
        if self._model is None:
            raise UserError(
                f"{call} needs the model: stoa_jax.Index.open({self._opened.place!r}, model); "
                "without one, use vectors"
            )
        return self._model

    def _vector(self, query: "Query") -> np.ndarray:
        if isinstance(query, str):
            vectors = self._needs_model("a text query").encode_text([query])
        elif isinstance(query, np.ndarray) and query.ndim == 1:
            vectors = query[None]
        elif isinstance(query, Sequence) and query and isinstance(query[0], float | int):
            vectors = np.asarray([query])
        else:
            vectors = self._needs_model("a video query").encode_video([cast("Video | Clip", query)])
        return self._checked(vectors)

    def _checked(self, queries: np.ndarray) -> np.ndarray:
        """Return queries as float64 [q, d]."""
        dim = self._opened.settings.dim
        try:
            out = np.asarray(queries, np.float64)
        except (TypeError, ValueError) as error:
            raise UserError(f"queries: not an array of numbers ({error})") from None
        if out.ndim != 2 or out.shape[1] != dim:
            shape = list(np.shape(queries))
            raise UserError(f"queries: shape {shape}; this index holds vectors of width {dim}")
        bad = ~(np.linalg.norm(out, axis=1) <= segments.MAX_NORM)
        if bad.any():
            raise UserError(f"query {int(np.flatnonzero(bad)[0])}: it holds NaN or infinity")
        return out


def _fusion(model: Encoder) -> "Fusion":
    from stoa_jax.index.fusion import Fusion

    return Fusion(model)


def _check_k(k: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise UserError(f"k: {k!r}; give a number of results of 1 or more")
