"""Rendered clips of the live world in one file, for later runs on the same machine.

Plain NumPy arrays. What all kinds of a clip share, its frames and boxes, is stored once. The name
of the file contains a hash of the options and of the code that renders, so after a change
in either, the clips are rendered again.
"""

import hashlib
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from stoa_jax import files
from stoa_jax.errors import UserError

_SHARED = ("boxes", "classes", "scores")  # arrays, besides the strings `video_id` and `frames`
_BY_KIND = ("tokens", "tags")  # arrays with a row for each text
_HERE = Path(__file__).resolve().parent
# The code that decides what a rendered clip is.
_CODE = (_HERE, _HERE.parents[1] / "text", _HERE.parent / "records.py")

Clips = list[dict[str, dict[str, Any]]]  # a record of every kind for each clip


def name_of(*parts: object) -> str:
    """Return the file's name for these options."""
    return f"clips-{digest(_CODE, *parts, cv2.__version__)}.npz"


def digest(code: Sequence[Path], *parts: object) -> str:
    """Hash source files, or all those of a folder, and the representation of other parts."""
    hashed = hashlib.sha256(repr(parts).encode())
    for place in code:
        for path in sorted(place.glob("*.py")) if place.is_dir() else [place]:
            hashed.update(path.read_bytes())
    return hashed.hexdigest()[:16]


def write(path: Path, clips: Clips) -> None:
    """Write the clips of a split."""
    first = [next(iter(clip.values())) for clip in clips]
    arrays = {
        **_packed("video_id", [[record["video_id"]] for record in first]),
        **_packed("frames", [record["frames"] for record in first]),
        **{name: np.stack([record[name] for record in first]) for name in _SHARED},
    }
    for kind in clips[0]:
        records = [clip[kind] for clip in clips]
        for name in ("texts", "answers"):
            arrays |= _packed(f"{kind}/{name}", [record[name] for record in records])
        for name in _BY_KIND:
            arrays[f"{kind}/{name}"] = np.concatenate([record[name] for record in records])
    save(path, arrays)


def read(path: Path) -> Clips:
    """Read what `write` wrote."""
    arrays = load(path)
    ids, frames = _unpacked(arrays, "video_id"), _unpacked(arrays, "frames")
    clips: Clips = [{} for _ in ids]
    kinds = [name.removesuffix("/tokens") for name in arrays if name.endswith("/tokens")]
    for kind in kinds:
        texts, answers = _unpacked(arrays, f"{kind}/texts"), _unpacked(arrays, f"{kind}/answers")
        at = 0
        for i, clip in enumerate(clips):
            rows = slice(at, at + len(texts[i]))
            clip[kind] = {
                "video_id": ids[i][0],
                "frames": frames[i],
                **{name: arrays[name][i] for name in _SHARED},
                "texts": texts[i],
                **{name: arrays[f"{kind}/{name}"][rows] for name in _BY_KIND},
                "answers": answers[i],
            }
            at = rows.stop
    return clips


def save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an .npz file, atomically. A full disk is reported and does not end the run."""
    try:
        with files.atomic(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
    except OSError as error:
        print(f"data.live_dir: {path} was not written: {error}", file=sys.stderr, flush=True)


def load(path: Path) -> dict[str, np.ndarray]:
    """Read all arrays of an .npz file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); delete it, and its content is computed again"
        ) from error


def _packed(name: str, groups: Sequence[Sequence[bytes]]) -> dict[str, np.ndarray]:
    """Return one array of all bytes, the length of each string, and the strings per group."""
    every = [text for group in groups for text in group]
    return {
        name: np.frombuffer(b"".join(every), np.uint8),
        f"{name}/lengths": np.array([len(text) for text in every], np.int32),
        f"{name}/counts": np.array([len(group) for group in groups], np.int32),
    }


def _unpacked(arrays: Mapping[str, np.ndarray], name: str) -> list[list[bytes]]:
    """Return the groups of strings that `_packed` joined."""
    joined = arrays[name].tobytes()
    ends = np.cumsum(arrays[f"{name}/lengths"], dtype=np.int64).tolist()
    starts = [0, *ends]
    every = [joined[start:end] for start, end in zip(starts, ends, strict=False)]
    groups, at = [], 0
    for count in arrays[f"{name}/counts"].tolist():
        groups.append(every[at : at + count])
        at += count
    return groups
