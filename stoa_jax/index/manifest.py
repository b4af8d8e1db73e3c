"""The manifest: the one file that lists the segments of an index.

A change first writes its files under new names, syncs them, and then replaces the manifest
atomically. So an index is always exactly what its last manifest lists.
"""

import dataclasses
import json
from pathlib import Path

from stoa_jax.errors import UserError
from stoa_jax.index import files

NAME = "manifest.json"
FORMAT = "stoa-jax index"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class SegmentEntry:
    """One immutable segment and its deleted rows."""

    name: str  # its directory under segments/
    rows: int
    files: dict[str, int]  # file name: bytes
    exponent: int  # scan.npy is float16(vectors * 2**exponent)
    norm: float  # the largest norm of a vector in scan.npy, before scaling
    error: float  # the largest distance between a vector and its version in scan.npy
    deleted: str = ""  # the file of deleted positions, in the segment's directory
    deleted_rows: int = 0

    @property
    def alive(self) -> int:
        """Number of rows that are not deleted."""
        return self.rows - self.deleted_rows


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings that all rows of an index share."""

    dim: int
    segment: float | str = 10.0  # seconds, or "scene"
    stride: float = 5.0
    fusion: bool = False
    fingerprint: str | None = None  # of the model; None until vectors of a named model are added
    model: str | None = None  # where the model was opened from, for the command line
    threshold: float | None = None  # for `Hit.matched`; None until it is measured
    threshold_note: str = ""  # how it was measured


@dataclasses.dataclass(frozen=True)
class Manifest:
    """One committed state of an index."""

    settings: Settings
    generation: int = 0
    segments: tuple[SegmentEntry, ...] = ()

    def __len__(self) -> int:
        return sum(entry.alive for entry in self.segments)

    def following(self, **changes) -> "Manifest":
        """Return the next state, with some fields changed."""
        return dataclasses.replace(self, generation=self.generation + 1, **changes)


def commit(directory: Path, manifest: Manifest) -> None:
    """Make `manifest` the state of the index; the files that it names must already be synced."""
    content = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(manifest)}
    files.replace(directory / NAME, json.dumps(content, indent=1).encode())


def read(directory: Path) -> Manifest:
    """Read the state of an index, or raise UserError with the reason."""
    path = directory / NAME
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{directory}: no index here (no {NAME}); create one with stoa_jax.Index.create"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        fields = json.loads(content)
        if fields["format"] != FORMAT:
            raise ValueError(f"its format is {fields['format']!r}")
        if fields["version"] != VERSION:
            raise UserError(
                f"{directory}: an index of format version {fields['version']}; this stoa_jax reads "
                f"version {VERSION}: open it with the version that wrote it, or build it again"
            )
        return Manifest(
            settings=Settings(**fields["settings"]),
            generation=int(fields["generation"]),
            segments=tuple(SegmentEntry(**entry) for entry in fields["segments"]),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path}: damaged or truncated ({type(error).__name__}: {error}); copy the index "
            "again or rebuild it"
        ) from error
