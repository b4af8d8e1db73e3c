"""Run a Hugging Face object-detection model over the frames that the build samples.

`python -m stoa_jax.data.detect` is the command line. PyTorch and transformers are needed here and
nowhere else in `stoa_jax.data`.
"""

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

from stoa_jax.data import video
from stoa_jax.data.sources.entries import clean
from stoa_jax.data.sources.files import VIDEO_SUFFIXES, Files
from stoa_jax.errors import UserError

# frames, uint8 [H, W, 3] each -> for each frame a list of (box in pixels, class, score)
Detector = Callable[[Sequence[np.ndarray]], list[list[tuple[list[float], str, float]]]]


def load_detector(
    directory: str | os.PathLike[str], threshold: float, device: str = "", batch_size: int = 12
) -> Detector:
    """Load an object-detection model from a directory or by its name on the hub."""
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
        raise UserError(f"{directory}: not an object-detection model ({reason})") from None
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).eval()
    names = model.config.id2label

    def detect(frames: Sequence[np.ndarray]):
        found = []
        for i in range(0, len(frames), batch_size):
            part = list(frames[i : i + batch_size])
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
    """Yield (id, path) of every video under a directory, with the ids of a `folder` data set."""
    if root.is_file():
        yield root.stem, root
        return
    paths = list(Files(root).videos())
    if not paths:
        raise UserError(f"--videos={root}: contains no video ({', '.join(sorted(VIDEO_SUFFIXES))})")
    bare = [p.relative_to(root).with_suffix("").as_posix() for p in paths]
    counts = collections.Counter(bare)
    for path, name in zip(paths, bare, strict=True):
        yield clean(name if counts[name] == 1 else path.relative_to(root).as_posix()), path


def share_of(videos: Sequence[tuple[str, Path]], share: str) -> list[tuple[str, Path]]:
    """Return the share "I/N" of the videos, chosen by a hash of their ids.

    A video stays in its share when other videos are added.
    """
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", share)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--share={share}: write I/N, such as 1/8 to 8/8")
    index, count = int(match[1]), int(match[2])
    return [v for v in videos if zlib.crc32(v[0].encode("utf-8", "replace")) % count == index - 1]


def frame_lines(
    name: str,
    frames: Sequence[np.ndarray],
    info: video.ReadInfo,
    detector: Detector,
    most: int,
) -> list[str]:
    """Detect objects and return one JSON line per frame, with boxes in pixels of `frames`."""
    found = detector(frames)
    lines = []
    for i, (frame, objects) in enumerate(zip(frames, found, strict=True)):
        best = sorted(objects, key=lambda o: -o[2])[:most]
        row = {
            "video": name,
            "frame": i,
            "time": round(info.times[i], 4),
            "width": frame.shape[1],
            "height": frame.shape[0],
            "objects": [
                {"box": [round(x, 2) for x in box], "class": label, "score": round(score, 4)}
                for box, label, score in best
            ],
        }
        lines.append(json.dumps(row, ensure_ascii=False))
    return lines


def finished(path: Path, frames: int) -> set[str]:
    """Return the videos whose lines are complete, and truncate the file after the last of them."""
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
                        f"{path}: the line at byte {start} is not a detection; name another --out"
                    ) from None
                break
            if number != count % frames:
                raise UserError(
                    f"{path}: a video has other than {frames} frames, at byte {start}; "
                    "name another --out, or the --frames that it was written with"
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
    """Append the detections of all unfinished videos; return how many succeeded and failed."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        done = finished(out, frames)
        failures = out.with_name(out.name + ".failures.jsonl")
        return _detect(
            [v for v in videos if v[0] not in done],
            detector, out, failures, frames, short_side, most, progress,
        )  # fmt: skip
    except OSError as error:
        raise UserError(
            f"--out={out}: {error.strerror or error}; run the same command again to continue"
        ) from None


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
