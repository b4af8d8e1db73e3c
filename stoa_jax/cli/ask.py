"""`stoa ask`: answer a question about each video."""

import argparse
import dataclasses
from typing import Any

from stoa_jax.cli import shared


def register(subparsers: Any) -> None:
    """Add the command `ask`."""
    parser = shared.command(subparsers, "ask", run, "answer a question about each video")
    parser.add_argument("--question", required=True, help="the question")
    parser.add_argument("--top", type=int, default=1, help="answers to print (default: 1)")


def run(arguments: argparse.Namespace) -> int:
    """Print the likeliest answers with their probabilities."""
    videos = shared.find_videos(arguments.videos)
    model = shared.open_model(arguments)
    result = model.answer(
        [shared.clip_of(path, arguments) for path in videos],
        [arguments.question] * len(videos),
        top=arguments.top,
        **shared.options(arguments),
    )
    answers, done, failed = shared.split_failed(result, videos, arguments)
    for path, best in zip(done, answers, strict=True):
        if arguments.json:
            found = [dataclasses.asdict(answer) for answer in best]
            shared.print_json({"video": path, "question": arguments.question, "answers": found})
            continue
        words = ", ".join(f"{answer.text} ({answer.probability:.2f})" for answer in best)
        print(f"{path}: {words}" if len(videos) > 1 else words)
    return shared.report_failures(failed, videos, arguments)
