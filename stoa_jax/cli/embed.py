"""`stoa embed`: embed videos and texts in one space."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from stoa_jax.cli import shared
from stoa_jax.errors import UserError


def register(subparsers: Any) -> None:
    """Add the command `embed`."""
    parser = shared.command(
        subparsers, "embed", run, "embed videos and texts as unit vectors of one space"
    )
    parser.add_argument(
        "--text", action="append", default=[], help="also embed this text; may be repeated"
    )
    parser.add_argument("--output", type=Path, help="write float32 [n, d] to this .npy file")


def run(arguments: argparse.Namespace) -> int:
    """Embed, and print or write the vectors: videos first, then texts."""
    if arguments.output is not None and arguments.output.suffix != ".npy":
        raise UserError(f"--output: {arguments.output} must end in .npy")
    videos = shared.find_videos(arguments.videos)
    model = shared.open_model(arguments)
    texts = model.encode_text(arguments.text) if arguments.text else None
    result = model.encode_video(
        [shared.clip_of(path, arguments) for path in videos], **shared.options(arguments)
    )
    vectors, done, failed = shared.split_failed(result, videos, arguments)
    rows = [("video", path, vector) for path, vector in zip(done, vectors, strict=True)]
    if texts is not None:
        rows += [("text", text, v) for text, v in zip(arguments.text, texts, strict=True)]
    if arguments.output is not None:
        from stoa_jax.files import atomic

        with atomic(arguments.output) as temporary, open(temporary, "wb") as file:
            np.save(file, np.stack([v for *_, v in rows]) if rows else vectors)
    for row, (kind, name, vector) in enumerate(rows):
        if arguments.output is not None:
            line = {kind: name, "row": row}
        else:
            line = {kind: name, "vector": vector.astype(float).round(7).tolist()}
        if arguments.json:
            shared.print_json(line)
        else:
            print(name, *line.get("vector", [f"row {row}"]))
    return shared.report_failures(failed, videos, arguments)
