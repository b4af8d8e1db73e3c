"""Finds objects in the sampled frames with any Hugging Face object-detection model.

    python -m stoa_jax.data.detect --videos=DIR --model=HF_DIR --out=detections.jsonl

Writes the JSON lines that `--detections` reads, one a frame, of the same frames that the build
samples. Run the same command again after a stop: videos that are done stay, a torn last line is cut
off. Videos that cannot be read are named in OUT.failures.jsonl. Eight processes share the work by
--share=1/8 to --share=8/8, each with an --out of its own; `cat` makes one file of theirs.

Needs PyTorch and transformers, which nothing else here does.
"""

import argparse
import collections
import json
import os
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stoa_jax import command_line
from stoa_jax.data import video
from stoa_jax.data.sources.entries import clean
from stoa_jax.data.sources.files import VIDEO_SUFFIXES, Files
from stoa_jax.errors import UserError

# (pictures uint8 [H, W, 3]) -> for each a list of (box in pixels, class, score)
Detector = Callable[[Sequence[np.ndarray]], list[list[tuple[list[float], str, float]]]]


def load_detector(
    directory: str | os.PathLike[str], threshold: float, device: str = "", batch_size: int = 12
) -> Detector:
    """A detector from a directory (or hub name) of an object-detection model."""
    try:
        import torch
        from transformers import AutoImageProcessor, AutoModelForObjectDetection
    except ImportError as error:
        raise UserError(
            f"detection needs PyTorch and transformers ({error}): pip install -r "
            "requirements-torch.txt"
        ) from None
    try:
        processor = AutoImageProcessor.from_pretrained(directory)
        model = AutoModelForObjectDetection.from_pretrained(directory)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{directory}: no object-detection model ({reason})") from None
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).eval()
    names = model.config.id2label

    def detect(pictures: Sequence[np.ndarray]):
        found = []
        for i in range(0, len(pictures), batch_size):
            part = list(pictures[i : i + batch_size])
            inputs = processor(images=part, return_tensors="pt").to(device)
            with torch.inference_mode():
                outputs = model(**inputs)
            sizes = [p.shape[:2] for p in part]
            for result in processor.post_process_object_detection(
                outputs, threshold=threshold, target_sizes=sizes
            ):
                boxes, labels = result["boxes"].tolist(), result["labels"].tolist()
                labels = [str(names.get(label, label)) for label in labels]
                found.append(list(zip(boxes, labels, result["scores"].tolist(), strict=True)))
        return found

    return detect


def find_videos(root: Path) -> Iterator[tuple[str, Path]]:
    """(id, path) of every video under a directory; the ids that a `folder` set gives."""
    if root.is_file():
        yield root.stem, root
        return
    paths = list(Files(root).videos())
    if not paths:
        raise UserError(f"--videos={root}: no video in it ({', '.join(sorted(VIDEO_SUFFIXES))})")
    bare = [p.relative_to(root).with_suffix("").as_posix() for p in paths]
    counts = collections.Counter(bare)
    for path, name in zip(paths, bare, strict=True):
        yield clean(name if counts[name] == 1 else path.relative_to(root).as_posix()), path


def share_of(videos: Sequence[tuple[str, Path]], share: str) -> list[tuple[str, Path]]:
    """Those of the videos that are for process I of N, "I/N": by their ids, whatever is added."""
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", share)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--share={share}: write I/N, such as 1/8 to 8/8")
    index, count = int(match[1]), int(match[2])
    return [v for v in videos if zlib.crc32(v[0].encode("utf-8", "replace")) % count == index - 1]


def frame_lines(
    name: str,
    pictures: Sequence[np.ndarray],
    info: video.ReadInfo,
    detector: Detector,
    most: int,
) -> list[str]:
    """One JSON line a frame: boxes in the pixels of the pictures that were looked at."""
    found = detector(pictures)
    lines = []
    for i, (picture, objects) in enumerate(zip(pictures, found, strict=True)):
        best = sorted(objects, key=lambda o: -o[2])[:most]
        row = {
            "video": name,
            "frame": i,
            "time": round(info.times[i], 4),
            "width": picture.shape[1],
            "height": picture.shape[0],
            "objects": [
                {"box": [round(x, 2) for x in box], "class": label, "score": round(score, 4)}
                for box, label, score in best
            ],
        }
        lines.append(json.dumps(row, ensure_ascii=False))
    return lines


def finished(path: Path, frames: int) -> set[str]:
    """Videos whose lines are all there; what follows the last of them is cut off."""
    if not path.exists():
        return set()
    done: set[str] = set()
    keep = offset = count = 0
    with open(path, "rb+") as file:
        for data in file:
            start, offset = offset, offset + len(data)
            try:
                row: Any = json.loads(data) if data.endswith(b"\n") else None
                name, number = str(row["video"]), int(row["frame"])
            except (ValueError, TypeError, KeyError):
                if data.endswith(b"\n"):
                    raise UserError(
                        f"{path}: holds other lines than detections, at byte {start}; "
                        "name another --out"
                    ) from None
                break
            if number != count % frames:
                raise UserError(
                    f"{path}: has other than {frames} frames of a video, at byte {start}; "
                    "name another --out, or the --frames it was made with"
                )
            count = number + 1
            if count == frames:
                done.add(name)
                keep = offset
        file.truncate(keep)
    return done


def detect_videos(
    videos: Sequence[tuple[str, Path]],
    detector: Detector,
    out: Path,
    *,
    frames: int = 12,
    short_side: int = 480,
    most: int = 30,
    progress: bool = True,
) -> tuple[int, int]:
    """Appends the detections of all videos that are not done; (found, failed)."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        done = finished(out, frames)
        failures = out.with_name(out.name + ".failures.jsonl")
        return _detect(
            [v for v in videos if v[0] not in done],
            detector, out, failures, frames, short_side, most, progress,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"--out={out}: {error.strerror or error}; run again to go on") from None


def _detect(videos, detector, out, failures, frames, short_side, most, progress):
    good = bad = 0
    started = time.monotonic()
    with open(out, "a", encoding="utf-8") as file, open(failures, "w", encoding="utf-8") as errors:
        for name, path in videos:
            try:
                pictures, info = video.read_frames(path, frames, short_side=short_side)
            except video.VideoError as error:
                bad += 1
                errors.write(json.dumps({"video": name, "error": str(error)}) + "\n")
                errors.flush()
                continue
            lines = frame_lines(name, pictures, info, detector, most)
            file.write("\n".join(lines) + "\n")
            file.flush()
            good += 1
            if progress and good % 20 == 0:
                rate = good / (time.monotonic() - started)
                print(f"{good + bad}/{len(videos)} videos, {rate:.1f}/s", file=sys.stderr)
    return good, bad


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m stoa_jax.data.detect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--videos", required=True, type=Path, help="a directory, or one video")
    parser.add_argument("--model", required=True, help="a directory with the model")
    parser.add_argument("--out", required=True, type=Path, help="the JSON lines to write")
    parser.add_argument("--frames", type=int, default=12, help="a video; as the build samples")
    parser.add_argument("--short-side", type=int, default=480, help="pixels the model gets")
    parser.add_argument("--threshold", type=float, default=0.2, help="least score")
    parser.add_argument("--most", type=int, default=30, help="objects kept a frame")
    parser.add_argument("--batch-size", type=int, default=12, help="frames at once")
    parser.add_argument("--device", default="", help="cpu or cuda; the fastest there is")
    parser.add_argument("--share", default="1/1", help="I/N: the videos of process I of N")
    known = parser.parse_args(argv)
    return command_line.run(
        lambda: _run(known), stopped="stopped; run the same command again to continue"
    )


def _run(known: argparse.Namespace) -> int:
    if not known.videos.exists():
        raise UserError(f"--videos={known.videos}: no such file or directory")
    videos = share_of(list(find_videos(known.videos)), known.share)
    detector = load_detector(known.model, known.threshold, known.device, known.batch_size)
    good, bad = detect_videos(
        videos,
        detector,
        known.out,
        frames=known.frames,
        short_side=known.short_side,
        most=known.most,
    )
    kept = len(videos) - good - bad
    print(f"{known.out}: {good} videos done, {kept} were done before, {bad} failed")
    return command_line.FAILED if bad and not good and not kept else command_line.DONE


if __name__ == "__main__":
    sys.exit(main())
