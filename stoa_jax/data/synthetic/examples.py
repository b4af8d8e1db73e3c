"""Clips of the synthetic world as files: videos, a table of captions, and detections.

They have the layout of a folder of your own: `captions.csv` is what the data set `folder` reads.
"""

import csv
import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from stoa_jax.data.synthetic import CLASS_NAMES, SyntheticClip, World

CLIPS = 24
FRAMES, RATE, SIZE = 24, 6, 144  # of a clip: 4 seconds
OBJECTS = 3  # at most, as the shipped model was trained on
VIDEOS, DETECTIONS, CAPTIONS = "videos", "detections.jsonl", "captions.csv"


def world() -> World:
    """Return the world that the example clips are from."""
    return World("test", size=SIZE, frames=FRAMES, max_objects=OBJECTS)


def write_examples(directory: Path, count: int = CLIPS) -> list[SyntheticClip]:
    """Write `count` clips into a directory and return them.

    `videos/` holds MP4 files, `detections.jsonl` what a detector saw, and `captions.csv` their
    captions; every fourth clip is for validation.
    """
    (directory / VIDEOS).mkdir(parents=True)
    clips = [world().clip(i) for i in range(count)]
    with (
        open(directory / DETECTIONS, "w", encoding="utf-8") as boxes,
        open(directory / CAPTIONS, "w", encoding="utf-8", newline="") as captions,
    ):
        table = csv.writer(captions)
        table.writerow(["video", "caption", "split"])
        for i, clip in enumerate(clips):
            write_video(directory / VIDEOS / f"{clip.video_id}.mp4", clip.frames)
            boxes.writelines(json.dumps(row) + "\n" for row in detections(clip))
            split = "validation" if i % 4 == 3 else "train"
            table.writerows([clip.video_id, text, split] for text in clip.captions)
    return clips


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
