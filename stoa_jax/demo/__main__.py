"""Show the shipped model, then train a small one from scratch, on two CPU cores.

    python -m stoa_jax.demo [--workdir=runs/demo] [--full] [--steps=1.0] [--clips=1.0]

Act one evaluates the shipped model on fresh test clips of the synthetic world and writes
WORKDIR/index.html. Act two trains `tiny` from scratch in the train loop, with all six losses and
question answering, and adds its learning curve to the page.

With --full it builds the data sets instead, trains a small CLIP, pre-trains `tiny` from it, and
fine-tunes and evaluates retrieval, captioning, question answering and multiple choice.

Running the command again continues where it stopped.
"""

import argparse
import sys
from pathlib import Path

from absl import logging

from stoa_jax.errors import UserError


def main() -> None:
    """Parse the command line and run the demonstration."""
    parser = argparse.ArgumentParser(
        prog="python -m stoa_jax.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--full", action="store_true", help="build, train and evaluate everything")
    parser.add_argument(
        "--steps",
        type=float,
        default=1.0,
        help="scales the length of all training; use 0.01 to try it",
    )
    parser.add_argument(
        "--clips", type=float, default=1.0, help="scales the data sets; use 0.01 to try it"
    )
    parser.add_argument("--data-dir", type=Path, help="with --full; default: WORKDIR/data")
    parser.add_argument(
        "--processes", type=int, default=2, help="with --full: processes that build the data sets"
    )
    arguments = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    try:
        if arguments.full:
            from stoa_jax.demo import full

            full.run(
                arguments.workdir,
                arguments.data_dir or arguments.workdir / "data",
                arguments.processes,
                arguments.steps,
                arguments.clips,
            )
        else:
            from stoa_jax.demo import acts

            acts.run(arguments.workdir, steps=arguments.steps, clips=arguments.clips)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
