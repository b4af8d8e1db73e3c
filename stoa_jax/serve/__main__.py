"""`python -m stoa_jax.serve`: the same as `stoa serve`."""

import argparse
import sys

from stoa_jax import command_line
from stoa_jax.cli import serve


def main() -> int:
    """Serve the page and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m stoa_jax.serve", description=serve.__doc__)
    serve.add_arguments(parser)
    arguments = parser.parse_args()
    return command_line.run(lambda: serve.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
