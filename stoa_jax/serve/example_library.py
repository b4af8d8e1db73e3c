"""A small library of synthetic clips with an index, made on first use."""

import json
import os
import shutil
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from stoa_jax.data.synthetic import CLASS_NAMES, SyntheticClip, World
from stoa_jax.errors import UserError

CLIPS = 24
FRAMES, RATE, SIZE = 24, 6, 144  # of a clip: 4 seconds
OBJECTS = 3  # at most, as the shipped model was trained on
VERSION = 2  # another when the clips or the index change
DETECTIONS = "detections.jsonl"


def cache_directory() -> Path:
    """Return where generated and transcoded videos are kept: $STOA_CACHE, or the user's cache."""
    if chosen := os.environ.get("STOA_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "stoa_jax"


def open_library(model: Any, cache: Path, clips: int = CLIPS) -> Path:
    """Return the directory of the library, generated and indexed with `model` if it is not there.

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
    world = World("test", size=SIZE, frames=FRAMES, max_objects=OBJECTS)
    (directory / "videos").mkdir()
    examples = []
    with open(directory / DETECTIONS, "w", encoding="utf-8") as file:
        for i in range(clips):
            clip = world.clip(i)
            write_video(directory / "videos" / f"{clip.video_id}.mp4", clip.frames)
            file.writelines(json.dumps(row) + "\n" for row in detections(clip))
            examples.append(min(clip.captions, key=len))
    (directory / "examples.json").write_text(json.dumps(examples, indent=1), encoding="utf-8")


def detections(clip: SyntheticClip) -> Iterator[dict[str, Any]]:
    """Yield what a detector saw in each frame, as `stoa_jax.data.build --detections` reads it."""
    for t in range(len(clip.frames)):
        yield {
            "video": clip.video_id,
            "frame": t,
            "time": round(t / RATE, 4),
            "width": 1,
            "height": 1,
            "objects": [
                {
                    "box": clip.boxes[t, k].round(5).tolist(),
                    "class": CLASS_NAMES[clip.classes[t, k]],
                    "score": round(float(clip.scores[t, k]), 4),
                }
                for k in range(clip.classes.shape[1])
                if clip.classes[t, k] >= 0
            ],
        }


def write_video(path: Path, frames: np.ndarray) -> None:
    """Write frames uint8 [T, H, W, 3] as H.264 in MP4, which every browser plays."""
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as out:
        stream = out.add_stream("libx264", rate=Fraction(RATE), options={"crf": "16"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        out.mux(stream.encode())


def _index(model: Any, directory: Path) -> None:
    """Index the videos; without a match head there is nothing to re-rank by."""
    import stoa_jax

    try:
        with stoa_jax.Index.create(
            directory / "index", model, fusion="match" in model.has
        ) as index:
            videos = sorted((directory / "videos").iterdir())
            added = index.add(
                [stoa_jax.Clip(str(v), detections=str(directory / DETECTIONS)) for v in videos]
            )
        if added.failed:
            raise UserError(f"{directory}: {added.failed} generated videos could not be indexed")
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def example_queries(directory: Path, count: int = 4) -> list[str]:
    """Return the shortest captions of clips that look different."""
    try:
        found = json.loads((directory / "examples.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    # Neighbours look the same and differ in what happens: one of each pair is enough.
    return sorted(found[::2], key=len)[:count]
