"""A small library of synthetic clips with an index, created on first use."""

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from stoa_jax.data.synthetic.examples import CLIPS, DETECTIONS, VIDEOS, write_examples
from stoa_jax.errors import UserError

if TYPE_CHECKING:
    from stoa_jax.inference.model import Model

VERSION = 2  # another when the clips or the index change


def cache_directory() -> Path:
    """Return the directory of generated and transcoded videos: $STOA_CACHE, or the user's cache."""
    if chosen := os.environ.get("STOA_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "stoa_jax"


def open_library(model: "Model", cache: Path, clips: int = CLIPS) -> Path:
    """Return the directory of the library; generate and index it with `model` if necessary.

    It holds `videos/`, `detections.jsonl`, `examples.json` and `index/`.
    """
    fingerprint = "".join(c for c in model.fingerprint if c.isalnum())[:24]
    directory = cache / f"library-{VERSION}-{clips}-{fingerprint}"
    if directory.is_dir():
        return directory
    part = directory.with_name(f"{directory.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        generate(part, clips)
        os.replace(part, directory)
        _index(model, directory)
    except OSError as error:
        if directory.is_dir():
            return directory  # another process was faster
        raise UserError(
            f"{cache}: the example library cannot be written ({error.strerror or error}); name "
            "another directory with --cache=DIR"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return directory


def generate(directory: Path, clips: int) -> None:
    """Write videos, detections and example queries."""
    shortest = [min(clip.captions, key=len) for clip in write_examples(directory, clips)]
    (directory / "examples.json").write_text(json.dumps(shortest, indent=1), encoding="utf-8")


def _index(model: "Model", directory: Path) -> None:
    """Index the videos, with fusion features if the model has a match head."""
    import stoa_jax

    try:
        with stoa_jax.Index.create(
            directory / "index", model, fusion="match" in model.has
        ) as index:
            videos = sorted((directory / VIDEOS).iterdir())
            added = index.add(
                [stoa_jax.Clip(str(v), detections=str(directory / DETECTIONS)) for v in videos]
            )
        if added.failed:
            raise UserError(f"{directory}: {added.failed} generated videos could not be indexed")
    except BaseException:  # Ctrl-C, too, must leave no library without a whole index
        shutil.rmtree(directory, ignore_errors=True)
        raise


def example_queries(directory: Path, count: int = 4) -> list[str]:
    """Return the shortest captions of clips that look different."""
    try:
        found = json.loads((directory / "examples.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    # Neighbours look alike and differ only in what happens: use one of each pair.
    return sorted(found[::2], key=len)[:count]
