"""The flat store: a directory of immutable segments that is searched exactly.

An opened store keeps showing one committed state. Changes are made under the writer's lock: new
files are written and synced, the manifest is replaced, and files that it no longer names are
removed.
"""

import contextlib
import dataclasses
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from stoa_jax.errors import UserError
from stoa_jax.index import exact, files, manifest, scan, segments
from stoa_jax.index.lock import writer_lock
from stoa_jax.index.manifest import Manifest, SegmentEntry, Settings
from stoa_jax.index.rows import Rows, decoded, encoded
from stoa_jax.index.segments import Segment
from stoa_jax.index.store import Block, Store
from stoa_jax.locks import Locked

FAILURES = "failures.jsonl"
_OURS = {manifest.NAME, f"{manifest.NAME}.tmp", "lock", segments.DIRECTORY, FAILURES}
_FOLD_ROWS = 65_536  # small segments are merged into the next one up to this size


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """One opened committed state."""

    manifest: Manifest
    segments: tuple[Segment, ...]


class FlatStore:
    """Segments in a directory, as of the opening or the last write through this object."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.snapshot = _opened(directory, ())
        self._mutex = threading.RLock()
        self._depth = 0

    @classmethod
    def create(cls, directory: Path, settings: Settings) -> "FlatStore":
        """Create an empty store in a directory that is new, empty, or left by a killed creation."""
        if cls.exists(directory):
            raise UserError(f"{directory}: already contains an index; open it, or remove it first")
        try:
            foreign = sorted(set(os.listdir(directory)) - _OURS) if directory.exists() else []
        except OSError as error:
            raise UserError(
                f"{directory}: cannot be the directory of an index: {error.strerror}"
            ) from error
        if foreign:
            raise UserError(
                f"{directory}: not empty (it holds {foreign[0]!r}); use a separate directory for "
                "the index"
            )
        with files.clear_errors(directory, "creating"):
            directory.mkdir(parents=True, exist_ok=True)
            with writer_lock(directory, "create"):
                if not (directory / segments.DIRECTORY).exists():
                    files.make_directory(directory / segments.DIRECTORY)
                manifest.commit(directory, Manifest(settings))
        return cls(directory)

    @staticmethod
    def exists(directory: Path) -> bool:
        """Return whether a directory contains a store."""
        return (directory / manifest.NAME).exists()

    @property
    def place(self) -> str:
        """The directory, for messages."""
        return str(self.directory)

    @property
    def failures(self) -> Path:
        """Path of the record of failures."""
        return self.directory / FAILURES

    @property
    def settings(self) -> Settings:
        """Settings that all rows share."""
        return self.snapshot.manifest.settings

    @property
    def searched_by(self) -> str:
        """The library that scans, with its version."""
        return scan.described(self.settings.dim)

    def __len__(self) -> int:
        return len(self.snapshot.manifest)

    def ids(self) -> list[str]:
        """Return each id once, in the order of addition."""
        seen: dict[bytes, None] = {}
        for rows in _live_rows(self.snapshot.segments):
            seen.update(dict.fromkeys(rows.distinct_ids().to_pylist()))
        return [decoded(identity) for identity in seen]

    def videos_of(self, ids: Sequence[str]) -> dict[str, str | None]:
        """Return the videos of the given ids that are in the store."""
        wanted = _array(ids)
        found: dict[str, str | None] = {}
        for rows in _live_rows(self.snapshot.segments):
            near = rows.table.filter(pa.array(rows.with_id_in(wanted)))
            for identity, video in zip(
                near["id"].to_pylist(), near["video"].to_pylist(), strict=True
            ):
                found[decoded(identity)] = None if video is None else decoded(video)
        return found

    def search(self, queries: np.ndarray, k: int) -> list[exact.Found]:
        """Return the best rows for each query [q, d] in float64."""
        return list(exact.search(self.snapshot.segments, queries, k))

    def blocks(self) -> Iterator[Block]:
        """Yield the live rows with their vectors and features, some thousands at a time."""
        for segment in self.snapshot.segments:
            positions = segment.alive_positions()
            for first in range(0, len(positions), segments.BLOCK_ROWS):
                taken = positions[first : first + segments.BLOCK_ROWS]
                features = None if segment.features is None else segment.features[taken]
                yield Rows(segment.rows.table.take(taken)), segment.vectors[taken], features

    def features(self, found: exact.Found) -> np.ndarray:
        """Return the fusion features of found rows, in their order: float16 [k, f]."""
        taken = []
        for where, position in zip(found.segments, found.positions, strict=True):
            features = self.snapshot.segments[where].features
            assert features is not None
            taken.append(features[position])
        return np.stack(taken)

    @contextlib.contextmanager
    def writing(self, action: str) -> Iterator[None]:
        """Hold the writer's lock on the newest state; one thread may nest it."""
        if not self._mutex.acquire(timeout=5.0):
            raise Locked(f"{self.directory}: another thread is writing to this index")
        try:
            if self._depth:
                yield
                return
            with writer_lock(self.directory, action):
                self._depth += 1
                try:
                    self.snapshot = _opened(self.directory, self.snapshot.segments)
                    _sweep(self.directory, self.snapshot.manifest)
                    yield
                except BaseException:
                    # The manifest on disk decides which files stay, even after a failed commit or
                    # Ctrl-C. An error of this clean-up must not replace the first one.
                    with contextlib.suppress(Exception):
                        _sweep(self.directory, manifest.read(self.directory))
                    raise
                finally:
                    self._depth -= 1
        finally:
            self._mutex.release()

    @contextlib.contextmanager
    def _changing(self, action: str) -> Iterator[None]:
        with self.writing(action), files.clear_errors(self.directory, action):
            yield

    def append(
        self,
        rows: Rows,
        vectors: np.ndarray,
        features: np.ndarray | None = None,
        fingerprint: str | None = None,
    ) -> None:
        """Add rows in one commit; an existing id with the same start raises UserError."""
        with self._changing("add"):
            state = self.snapshot.manifest
            settings = checked_fingerprint(self.place, state.settings, len(state), fingerprint)
            if not len(rows):
                return
            row = rows.repeated()
            if row is not None:
                raise UserError(f"{row.id!r}: given twice with the same start ({row.start})")
            for segment in self.snapshot.segments:
                row = segment.rows.where(segment.alive).shared_with(rows)
                if row is not None:
                    raise UserError(
                        f"{row.id!r}: already in {self.directory} with the same start "
                        f"({row.start}); delete it first"
                    )
            kept = _kept(state.segments, len(rows))
            entry = segments.rewrite(
                self.directory,
                state.generation + 1,
                self.snapshot.segments[kept:],
                settings.dim,
                (rows, vectors, features),
            )
            assert entry is not None
            self._commit(
                state.following(settings=settings, segments=(*state.segments[:kept], entry))
            )

    def delete(self, ids: Sequence[str]) -> int:
        """Delete all rows of some ids in one commit; an unknown id raises UserError."""
        with self._changing("delete"):
            state, wanted = self.snapshot.manifest, _array(ids)
            entries, count, missing = [], 0, set(wanted.to_pylist())
            masks = []
            for segment in self.snapshot.segments:
                alive = segment.rows.where(segment.alive)
                missing -= set(alive.table.filter(alive.with_id_in(wanted))["id"].to_pylist())
                masks.append(segment.rows.with_id_in(wanted))
            if missing:
                names = ", ".join(repr(decoded(i)) for i in sorted(missing)[:3])
                raise UserError(
                    f"{self.directory}: no such id: {names}"
                    + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
                    + "; nothing was deleted"
                )
            for segment, mask in zip(self.snapshot.segments, masks, strict=True):
                dead = np.zeros_like(mask) if segment.alive is None else ~segment.alive
                new = mask & ~dead
                count += int(new.sum())
                if not new.any():
                    entries.append(segment.entry)
                elif not (dead | new).all():
                    entries.append(
                        segments.write_deleted(
                            self.directory, state.generation + 1, segment, dead | new
                        )
                    )
            if count:
                self._commit(state.following(segments=tuple(entries)))
            return count

    def compact(self) -> None:
        """Write all live rows as one segment, and free the space of deleted ones."""
        with self._changing("compact"):
            state = self.snapshot.manifest
            if len(state.segments) < 2 and not any(e.deleted for e in state.segments):
                return
            entry = segments.rewrite(
                self.directory, state.generation + 1, self.snapshot.segments, state.settings.dim
            )
            self._commit(state.following(segments=(entry,) if entry else ()))

    def merge(self, parts: Sequence[Store]) -> None:
        """Add the rows of other flat stores in one commit."""
        flat = [part for part in parts if isinstance(part, FlatStore)]
        if len(flat) < len(parts):
            raise UserError(f"{self.directory}: only flat indexes merge into a flat index")
        with self._changing("merge"):
            state = self.snapshot.manifest
            settings = state.settings
            for part in parts:
                settings = joined_settings(settings, part.settings, len(part), part.place)
            row = Rows.joined(
                [rows for store in (self, *flat) for rows in _live_rows(store.snapshot.segments)]
                or [Rows.of([])]
            ).repeated()
            if row is not None:
                raise UserError(
                    f"{row.id!r}: in more than one of the indexes to merge, with the same start "
                    f"({row.start}); delete it from all but one"
                )
            entries = []
            for part in flat:
                entry = segments.rewrite(
                    self.directory, state.generation + 1, part.snapshot.segments, settings.dim
                )
                entries += [entry] if entry else []
            self._commit(state.following(settings=settings, segments=(*state.segments, *entries)))

    def set(self, **changes) -> None:
        """Change settings in a separate commit."""
        with self._changing("set"):
            state = self.snapshot.manifest
            self._commit(state.following(settings=dataclasses.replace(state.settings, **changes)))

    def _commit(self, state: Manifest) -> None:
        manifest.commit(self.directory, state)
        self.snapshot = _opened(self.directory, self.snapshot.segments)
        _sweep(self.directory, state)


def checked_fingerprint(
    place: str, settings: Settings, rows: int, fingerprint: str | None
) -> Settings:
    """Return the settings after adding vectors of a model; an empty index takes the first model."""
    if fingerprint is None or settings.fingerprint is not None:
        return settings
    if rows:
        raise UserError(
            f"{place}: it holds vectors of an unnamed model, so vectors of model {fingerprint} "
            "cannot be added; build the index again with fingerprint="
        )
    return dataclasses.replace(settings, fingerprint=fingerprint)


def joined_settings(ours: Settings, theirs: Settings, rows: int, place: str) -> Settings:
    """Return the settings of both indexes, or raise UserError if their rows cannot be merged."""
    for name in ("dim", "segment", "stride", "fusion"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        if mine != other:
            raise UserError(f"{place}: its {name} is {other}; that of the merged index is {mine}")
    if rows and theirs.fingerprint != ours.fingerprint:
        raise UserError(
            f"{place}: its vectors are of model {theirs.fingerprint or '(not named)'}; the merged "
            f"index is for {ours.fingerprint or '(not named)'}: scores of two models do not compare"
        )
    return ours


def _opened(directory: Path, known: Sequence[Segment]) -> Snapshot:
    """Open the newest state; a writer may remove files of older states at the same time."""
    by_name = {segment.entry.name: segment for segment in known}
    state = manifest.read(directory)
    while True:
        try:
            return Snapshot(
                state,
                tuple(
                    _segment(directory, entry, by_name.get(entry.name), state.settings.dim)
                    for entry in state.segments
                ),
            )
        except FileNotFoundError as error:
            newer = manifest.read(directory)
            if newer == state:
                raise UserError(
                    f"{error.filename}: missing, but the manifest names it; copy the index again "
                    "or rebuild it"
                ) from error
            state = newer


def _segment(directory: Path, entry: SegmentEntry, known: Segment | None, dim: int) -> Segment:
    if known is None or known.entry.files[segments.VECTORS] != entry.files[segments.VECTORS]:
        return segments.open_segment(directory, entry, dim)
    if known.entry == entry:
        return known
    return segments.with_deleted(directory, known, entry)


def _sweep(directory: Path, state: Manifest) -> None:
    """Remove files that the manifest does not name, left by a killed writer or just replaced."""
    named = {entry.name: entry for entry in state.segments}
    with contextlib.suppress(OSError):
        for found in list(os.scandir(directory / segments.DIRECTORY)):
            if found.name not in named:
                files.remove_tree(Path(found.path))
                continue
            for file in list(os.scandir(found.path)):
                if file.name not in named[found.name].files:
                    os.unlink(file.path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(directory / f"{manifest.NAME}.tmp")


def _kept(entries: Sequence[SegmentEntry], rows: int) -> int:
    """Return how many segments stay unchanged; the others are merged into the new one.

    A segment is merged if the rows after it are as many, so that many small additions leave few
    segments and each row is rewritten only a logarithmic number of times.
    """
    kept = len(entries)
    while kept and entries[kept - 1].alive <= rows <= _FOLD_ROWS - entries[kept - 1].alive:
        kept -= 1
        rows += entries[kept].alive
    return kept


def _live_rows(opened: Sequence[Segment]) -> Iterator[Rows]:
    return (segment.rows.where(segment.alive) for segment in opened)


def _array(ids: Sequence[str]) -> pa.Array:
    for identity in ids:
        if not isinstance(identity, str):
            raise UserError(f"ids: {identity!r} is not a string")
    return pa.array(dict.fromkeys(encoded(i) for i in ids), pa.large_binary())
