"""`stoa caption`: describe each video in a sentence."""

import argparse
from typing import Any

from stoa_jax.cli import shared


def register(subparsers: Any) -> None:
    """Add the command `caption`."""
    parser = shared.command(subparsers, "caption", run, "write a caption for each video")
    parser.add_argument(
        "--beam", type=int, default=5, help="number of beams; 1 is greedy (default: 5)"
    )
    parser.add_argument("--max-pieces", type=int, default=30, help="maximum length (default: 30)")


def run(arguments: argparse.Namespace) -> int:
    """Print one caption per line."""
    videos = shared.find_videos(arguments.videos)
    model = shared.open_model(arguments)
    result = model.caption(
        [shared.clip_of(path, arguments) for path in videos],
        beam=arguments.beam,
        max_pieces=arguments.max_pieces,
        **shared.options(arguments),
    )
    captions, done, failed = shared.split_failed(result, videos, arguments)
    for path, caption in zip(done, captions, strict=True):
        if arguments.json:
            shared.print_json({"video": path, "caption": caption})
        else:
            print(f"{path}: {caption}" if len(videos) > 1 else caption)
    return shared.report_failures(failed, videos, arguments)
