"""The shipped configurations, and the commands that repeat the demonstration by hand."""

from pathlib import Path

from ml_collections import ConfigDict

from stoa_jax import sweep
from stoa_jax.errors import UserError

ROOT = Path(__file__).parents[2]


def shipped_config(name: str, argument: str = "synthetic") -> ConfigDict:
    """Return a shipped configuration on the synthetic world, from this checkout."""
    path = ROOT / "configs" / f"{name}.py"
    if not path.exists():
        raise UserError(f"{path} is missing; run the demo from a checkout of the project")
    c = sweep.load_module(path).get_config(argument)
    c.data.eval_split = "test"
    c.eval.every_steps = -1  # evaluated once, from the checkpoint
    c.eval.beam = 1
    c.log.tensorboard = False
    return c


def say(command: str) -> None:
    """Print a command that does the next step by hand."""
    print(f"\n$ {command}", flush=True)
