"""`stoa examples`: a few clips to try the other commands on."""

import argparse
from pathlib import Path
from typing import Any

from stoa_jax.command_line import DONE
from stoa_jax.errors import UserError


def register(subparsers: Any) -> None:
    """Add the command `examples`."""
    description = "write synthetic clips with captions and detections, to try things on"
    parser = subparsers.add_parser("examples", help=description, description=f"{description}.")
    parser.add_argument("directory", type=Path, help="a new directory")
    parser.add_argument("--clips", type=int, default=24, help="number of clips (default: 24)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the clips and say what is where."""
    from stoa_jax.data.synthetic import examples
    from stoa_jax.files import atomic_directory

    directory, count = arguments.directory, arguments.clips
    if count < 1:
        raise UserError(f"--clips={count}: it must be at least 1")
    if directory.exists():
        raise UserError(f"{directory}: exists already; name a new directory")
    with atomic_directory(directory) as folder:
        examples.write_examples(folder, count)
    print(f"{directory / examples.VIDEOS}: {count} clips of 4 seconds")
    print(f"{directory / examples.CAPTIONS}: their captions")
    print(f"{directory / examples.DETECTIONS}: the objects in their frames")
    return DONE
