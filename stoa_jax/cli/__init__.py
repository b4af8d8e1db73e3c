"""The console program `stoa`: use a trained model on videos from the command line.

Every module here with a function `register(subparsers)` is a command. It sets `run`, a function of
the parsed arguments that returns the exit code: 0 done, 1 failed, 2 a user error.
"""

import argparse
import importlib
import pkgutil
import sys
import warnings
from collections.abc import Sequence


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    import stoa_jax

    top = argparse.ArgumentParser(
        prog="stoa",
        description="Embed, caption, question, match, explain and search videos with a trained "
        "model. Training is `python -m stoa_jax.main`.",
        epilog="exit codes: 0 done, 1 failed, 2 an error that you can fix",
    )
    top.add_argument("--version", action="version", version=f"stoa_jax {stoa_jax.__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        found = importlib.import_module(f"{__name__}.{module.name}")
        if hasattr(found, "register"):
            found.register(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    from stoa_jax import command_line

    arguments = parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        for category in (DeprecationWarning, PendingDeprecationWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        warnings.showwarning = _note
        return command_line.run(lambda: arguments.run(arguments))


def _note(message, category, filename, lineno, file=None, line=None) -> None:
    """Show a warning as one line, without the source line that raised it."""
    print(f"note: {message}", file=sys.stderr)
