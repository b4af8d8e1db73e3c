"""`stoa match`: print how probable it is that texts describe videos."""

import argparse
from typing import Any

from stoa_jax.cli import shared


def register(subparsers: Any) -> None:
    """Add the command `match`."""
    parser = shared.command(
        subparsers, "match", run, "print how probable it is that texts describe videos"
    )
    parser.add_argument("--text", action="append", required=True, help="may be repeated")


def run(arguments: argparse.Namespace) -> int:
    """Print the probability of every pair, and the verdict of a calibrated model."""
    videos = shared.find_videos(arguments.videos)
    model = shared.open_model(arguments)
    result = model.match(
        [shared.clip_of(path, arguments) for path in videos],
        arguments.text,
        **shared.options(arguments),
    )
    table, done, failed = shared.split_failed(result, videos, arguments)
    calibrated = model.calibration is not None and model.calibration.threshold is not None
    for path, row in zip(done, table, strict=True):
        for text, probability in zip(arguments.text, row.tolist(), strict=True):
            matched = probability >= model.threshold if calibrated else None
            if arguments.json:
                shared.print_json(
                    {"video": path, "text": text, "probability": probability, "matched": matched}
                )
                continue
            verdict = {True: "  match", False: "  no match", None: ""}[matched]
            print(f"{probability:.4f}{verdict}  {path}  {text}")
    return shared.report_failures(failed, videos, arguments)
