"""Measure build and read rates per core, compared with the raw decoder in the same run.

    python -m benchmarks.loader [--videos=DIR] [--clips=64]

Without --videos it writes its own: 15 s of 640x360 H.264, moving shapes over texture. Everything
runs on one thread, so a rate is a rate per core. Compare only within a run.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import cv2
import numpy as np
from array_record.python import array_record_data_source
from tensorflow_datasets.proto import tf_example_pb2

from stoa_jax.data import builders, pipeline, sources, video
from stoa_jax.data.build.run import build

FRAMES, SHORT_SIDE, IMAGE = 12, 256, 224
SUFFIXES = (".mp4", ".mkv", ".mov", ".avi", ".webm")


def write_video(path: Path, seed: int, seconds: int = 15) -> None:
    """Write a video with texture, motion and the default keyframe distance."""
    rng = np.random.default_rng(seed)
    ground = cv2.resize(rng.integers(0, 255, (45, 80, 3), np.uint8), (960, 540))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        for i in range(25 * seconds):
            image = np.ascontiguousarray(ground[i % 180 : i % 180 + 360, i % 320 : i % 320 + 640])
            place = (int(320 + 200 * np.sin(i / 20)), 180)
            cv2.circle(image, place, 60, (200, 40, 40), -1)
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def rate(name: str, count: int, run: Callable[[], None]) -> float:
    """Run once; print and return clips per second of processor time, and by the clock."""
    clock, processor = time.perf_counter(), os.times()
    run()
    seconds = time.perf_counter() - clock
    now = os.times()
    used = sum(now[:4]) - sum(processor[:4])  # includes children
    print(f"| {name} | {count / seconds:.1f} | {count / used:.1f} |", flush=True)
    return count / used


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=Path)
    parser.add_argument("--clips", type=int, default=64)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root = args.videos or Path(scratch) / "videos"
        if args.videos is None:
            root.mkdir()
            for i in range(8):
                write_video(root / f"{i}.mp4", i)
        manual = Path(scratch) / "manual"
        manual.mkdir()
        (manual / "videos").symlink_to(root.resolve())
        found = sorted(p for p in root.rglob("*") if p.suffix in SUFFIXES)
        # Link the few videos repeatedly under new names.
        lines = ["video,caption"]
        for i in range(args.clips):
            link = manual / f"clip{i}{found[i % len(found)].suffix}"
            link.symlink_to(found[i % len(found)].resolve())
            lines.append(f"{link.name},a red ball number {i} moves to the left of the screen")
        (manual / "captions.csv").write_text("\n".join(lines) + "\n")
        print("| one core | clips/s by the clock | clips/s of processor time |\n|---|---|---|")
        measure_build(manual, Path(scratch) / "out", args.clips)
        measure_read(Path(scratch) / "out", args.clips)


def measure_build(manual: Path, out: Path, clips: int) -> None:
    """Measure the raw decoder on one clip after the other, then the whole build."""
    entries = sources.open_source("folder/captions", manual).splits["train"]

    def decode() -> None:
        for entry in entries:
            video.read_frames(entry.video_path, FRAMES, None, None, SHORT_SIDE)

    rate("raw decoder: video to 12 frames", clips, decode)
    settings = builders.Settings(frames=FRAMES, short_side=SHORT_SIDE)
    rate(
        "build, one process, start included",
        clips,
        lambda: build("folder/captions", out, manual, settings=settings),
    )


def measure_read(out: Path, clips: int, passes: int = 4) -> None:
    """Measure ArrayRecord and protobuf alone, with cv2 decoding and resizing, then the Loader."""
    split = pipeline.open_split(out, "folder/captions", "train")
    files = sorted(map(str, split.directory.glob("*.array_record-*")))
    source = array_record_data_source.ArrayRecordDataSource(files)

    def parse(i: int):
        return tf_example_pb2.Example.FromString(source[i]).features.feature

    def parse_all() -> None:
        for i in list(range(len(source))) * passes:
            parse(i)

    def decode_all() -> None:
        for i in list(range(len(source))) * passes:
            for data in parse(i)["frames"].bytes_list.value:
                image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
                cv2.resize(image, (IMAGE, IMAGE))

    rate("raw records: ArrayRecord and protobuf", passes * clips, parse_all)
    rate("raw records, cv2 decode and resize", passes * clips, decode_all)
    for crop in ("center", "random"):
        spec = pipeline.BatchSpec(frames=FRAMES, image_size=IMAGE, crop=crop)
        loader = pipeline.Loader(split, spec, clips // 4, threads=1, cache="off")

        def load(loader: pipeline.Loader = loader) -> None:
            for step in range(4 * passes):
                loader.batch(step)

        rate(f"Loader, {crop} crop", passes * (clips // 4) * 4, load)


if __name__ == "__main__":
    main()
