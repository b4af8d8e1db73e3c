"""Measure the Loader's speed on one core, compared with cv2.imdecode and cv2.resize alone.

    python -m benchmarks.loader [--videos=DIR] [--clips=32] [--rounds=7] [--smoke]

Without --videos it writes its own: 15 s of 640x360 H.264, with shapes that move over a texture. It
builds a data set from the videos and times that once. Then all sides read every clip in turn, on
one thread. They are compared by processor time, which other work on the machine hardly affects.
"""

import argparse
import tempfile
import time
from pathlib import Path

import av
import cv2
import numpy as np
from array_record.python import array_record_data_source
from tensorflow_datasets.proto import tf_example_pb2

from benchmarks import timing
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


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Measure, print the tables, and return the seconds per clip of every side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=Path)
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--smoke", action="store_true", help="few clips, to see that it runs")
    args = parser.parse_args(argv)
    clips, rounds, own = (4, 1, 1) if args.smoke else (args.clips, args.rounds, 8)
    cv2.setNumThreads(1)
    print(timing.environment("opencv-python-headless", "pillow", "av"))
    with tempfile.TemporaryDirectory() as scratch:
        root = args.videos or Path(scratch) / "videos"
        if args.videos is None:
            root.mkdir()
            for i in range(own):
                write_video(root / f"{i}.mp4", i, seconds=2 if args.smoke else 15)
        manual = Path(scratch) / "manual"
        manual.mkdir()
        (manual / "videos").symlink_to(root.resolve())
        found = sorted(p for p in root.rglob("*") if p.suffix in SUFFIXES)
        # Link the few videos repeatedly under new names.
        lines = ["video,caption"]
        for i in range(clips):
            link = manual / f"clip{i}{found[i % len(found)].suffix}"
            link.symlink_to(found[i % len(found)].resolve())
            lines.append(f"{link.name},a red ball number {i} moves to the left of the screen")
        (manual / "captions.csv").write_text("\n".join(lines) + "\n")
        out = Path(scratch) / "out"
        measure_build(manual, out, clips)
        seconds = {n: s / clips for n, s in measure_read(out, clips, rounds).items()}
    raw = seconds["cv2.imdecode and cv2.resize"]
    timing.table(
        ["one core, processor time", "clips/s", "of cv2 alone"],
        [[name, f"{1 / s:.1f}", f"{100 * raw / s:.0f} %"] for name, s in seconds.items()],
    )
    return seconds


def measure_build(manual: Path, out: Path, clips: int) -> None:
    """Time the raw video decoder, one clip after the other, then the whole build."""
    entries = sources.open_source("folder/captions", manual).splits["train"]

    def decode() -> None:
        for entry in entries:
            video.read_frames(entry.video_path, FRAMES, None, None, SHORT_SIDE)

    settings = builders.Settings(frames=FRAMES, short_side=SHORT_SIDE)
    for name, run in (
        ("read_frames: video to 12 frames", decode),
        (
            "build, one process, its start included",
            lambda: build("folder/captions", out, manual, settings=settings),
        ),
    ):
        began = time.perf_counter()
        run()
        print(f"{name}: {clips / (time.perf_counter() - began):.1f} clips/s by the clock")


def measure_read(out: Path, clips: int, rounds: int) -> dict[str, float]:
    """Return processor seconds of one pass over the clips, for every side."""
    split = pipeline.open_split(out, "folder/captions", "train")
    files = sorted(map(str, split.directory.glob("*.array_record-*")))
    source = array_record_data_source.ArrayRecordDataSource(files)

    def parse(i: int):
        return tf_example_pb2.Example.FromString(source[i]).features.feature

    jpegs = [list(parse(i)["frames"].bytes_list.value) for i in range(clips)]

    def decode_all(clip: list[bytes], interpolation: int = cv2.INTER_LINEAR) -> None:
        for data in clip:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
            cv2.resize(image, (IMAGE, IMAGE), interpolation=interpolation)

    def read_and_decode() -> None:
        for i in range(clips):
            decode_all(parse(i)["frames"].bytes_list.value)

    def loads(crop: str, train: bool):
        spec = pipeline.BatchSpec(frames=FRAMES, image_size=IMAGE, crop=crop)
        size = min(8, clips)
        loader = pipeline.Loader(split, spec, size, train=train, threads=1, cache="off")

        def run() -> None:
            for step in range(clips // size):
                loader.batch(step)

        return run

    sides = {
        "cv2.imdecode and cv2.resize": lambda: [decode_all(clip) for clip in jpegs],
        "the same with a bicubic filter": lambda: [decode_all(c, cv2.INTER_CUBIC) for c in jpegs],
        "the first, and reading the records": read_and_decode,
        "reading the records (ArrayRecord, protobuf)": lambda: [parse(i) for i in range(clips)],
        "Loader, center crop in training": loads("center", True),
        "Loader, random crop in training": loads("random", True),
        "Loader, center crop in evaluation (PIL's filter)": loads("center", False),
    }
    return timing.in_turn(sides, rounds, time.process_time)


if __name__ == "__main__":
    main()
