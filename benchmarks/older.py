"""Check out an older commit of this repository for a comparison."""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """Check out a commit into a temporary worktree, and remove the worktree afterwards."""
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / commit
        subprocess.run([*git, "add", "--detach", "--quiet", str(tree), commit], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def environment(tree: Path) -> dict[str, str]:
    """Return an environment in which Python imports that tree's package and our benchmarks.

    `benchmarks` has no `__init__`, so the modules that the tree lacks come from ours.
    """
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tree), str(ROOT)])}
