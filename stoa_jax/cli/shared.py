"""Code shared by the commands on videos: options, opening the model, and printing."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoa_jax.command_line import DONE, FAILED
from stoa_jax.errors import UserError

if TYPE_CHECKING:
    from stoa_jax.inference.model import Model
    from stoa_jax.inference.videos import Clip, Failure

VIDEO_SUFFIXES = tuple(
    ".3gp .avi .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv".split()
)


def command(
    subparsers: Any, name: str, run: Any, description: str, *, several: bool = True
) -> argparse.ArgumentParser:
    """Add a command on one or several videos, with their common options."""
    parser = subparsers.add_parser(name, help=description, description=f"{description}.")
    videos = "video files, or folders to search for videos" if several else "a video file"
    parser.add_argument(
        "videos" if several else "video", nargs="+" if several else None, help=videos
    )
    parser.add_argument(
        "--model",
        default=os.environ.get("STOA_MODEL"),
        help="a work directory, weights of any kind, 'synthetic' or a Hub name "
        "(default: $STOA_MODEL)",
    )
    parser.add_argument(
        "--frames", type=int, help="frames to sample from a video (default: the model's)"
    )
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    parser.add_argument("--truncate", action="store_true", help="cut texts that are too long")
    parser.add_argument("--start", type=float, help="start of the video part, in seconds")
    parser.add_argument("--end", type=float, help="end of the video part, in seconds")
    parser.add_argument("--detections", help="a file or folder of detections of the videos")
    if several:
        parser.add_argument("--batch-size", type=int, default=16, help="videos per batch")
        parser.add_argument(
            "--skip", action="store_true", help="continue after videos that fail, and exit with 1"
        )
        parser.add_argument(
            "--progress",
            action=argparse.BooleanOptionalAction,
            default=sys.stderr.isatty(),
            help="show a progress bar",
        )
    parser.add_argument("--json", action="store_true", help="print JSON, one object per line")
    parser.set_defaults(run=run)
    return parser


def open_model(arguments: argparse.Namespace) -> "Model":
    """Open the model that the command line names."""
    import stoa_jax

    if not arguments.model:
        raise UserError(
            "--model: name a model, for example --model=runs/retrieval, or set STOA_MODEL"
        )
    return stoa_jax.load(
        arguments.model,
        frames=arguments.frames,
        dtype=arguments.dtype,
        truncate=arguments.truncate,
    )


def clip_of(path: str, arguments: argparse.Namespace) -> "Clip":
    """Return a video with the part and the detections that the command line names."""
    import stoa_jax

    return stoa_jax.Clip(path, arguments.start, arguments.end, arguments.detections)


def find_videos(paths: Sequence[str]) -> list[str]:
    """Return the files, and the videos in folders in the order of their names."""
    found: list[str] = []
    for path in paths:
        if not os.path.isdir(path):
            found.append(path)
            continue
        inside = [
            str(file)
            for file in sorted(Path(path).rglob("*"))
            if file.suffix.lower() in VIDEO_SUFFIXES and file.is_file()
        ]
        if not inside:
            raise UserError(f"{path}: contains no video ({', '.join(VIDEO_SUFFIXES)})")
        found += inside
    return found


def options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of a call on several videos."""
    return {
        "batch_size": arguments.batch_size,
        "progress": arguments.progress,
        "on_error": "skip" if arguments.skip else "raise",
    }


def split_failed(
    result: Any, videos: Sequence[str], arguments: argparse.Namespace
) -> tuple[Any, list[str], "list[Failure]"]:
    """Return the results, their videos, and the failures."""
    if not arguments.skip:
        return result, list(videos), []
    found, failed = result
    lost = {failure.index for failure in failed}
    return found, [v for i, v in enumerate(videos) if i not in lost], failed


def report_failures(
    failed: "Sequence[Failure]", videos: Sequence[str], arguments: argparse.Namespace
) -> int:
    """Print what failed, and return the exit code."""
    for failure in failed:
        if arguments.json:
            print_json({"video": videos[failure.index], "error": str(failure.error)})
        print(f"error: {failure.error}", file=sys.stderr)
    return FAILED if failed else DONE


def print_json(value: Any) -> None:
    """Print one JSON object on a line."""
    print(json.dumps(value, ensure_ascii=False))
