"""Exit codes and error output that all command-line programs share."""

import sys
from collections.abc import Callable

from stoa_jax.errors import UserError

DONE, FAILED, MISTAKE, STOPPED = 0, 1, 2, 130  # exit codes


def run(
    command: Callable[[], int],
    expected: type[Exception] | tuple[type[Exception], ...] = UserError,
    stopped: str = "stopped",
) -> int:
    """Run a command and return its exit code; print an expected error as one line.

    Errors that are not `expected` are bugs and keep their traceback. `stopped` is printed when the
    user interrupts the command.
    """
    try:
        return command()
    except expected as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return STOPPED
