"""The entry point: flags, distributed start, dispatch on the mode.

python -m stoa_jax.main --config=configs/pretrain.py:synthetic --workdir=runs/demo
python -m stoa_jax.main --config=… --workdir=… --config.train.steps=200   # any key
python -m stoa_jax.main --config=… --workdir=… --mode=calibrate           # the match head
python -m stoa_jax.main --config=… --mode=plan --topology=v5e:16x16
"""

import dataclasses
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax
from absl import flags, logging
from ml_collections import ConfigDict

from stoa_jax import config_flags
from stoa_jax.errors import UserError

MODES = ("train", "eval", "calibrate", "plan", "profile")
TOPOLOGIES = ("v5e:16x16", "v5p:4x4x8", "v6e:16x16", "gpu:8", "cpu:8")
PEER_LOST_SECONDS = 30  # without a heartbeat from a peer for so long, the others end


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Parsed command line."""

    config: ConfigDict
    workdir: str
    mode: str
    topology: str


def main() -> None:
    """Parse the command line, join other processes, and run the mode."""
    flags.FLAGS.mark_as_parsed()  # grain and tfds read absl's flags
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)
    try:
        arguments = parse()
    except UserError as error:
        fail(error, 2)
    guarded(lambda: dispatch(arguments), distributed=arguments.mode != "plan")


def parse() -> Arguments:
    """Parse `sys.argv`; raise UserError for any mistake in it."""
    known = flags.FlagValues()
    flags.DEFINE_string("workdir", "", "Where checkpoints and metrics go.", flag_values=known)
    flags.DEFINE_enum("mode", "train", MODES, "What to do.", flag_values=known)
    flags.DEFINE_string(
        "topology", "", f"For --mode=plan: {', '.join(TOPOLOGIES)}.", flag_values=known
    )
    if any(arg in ("-h", "--help", "--helpfull") for arg in sys.argv[1:]):
        print(f"{__doc__}\n{known}")
        raise SystemExit(0)
    c, rest = config_flags.parse(known, sys.argv)
    if rest:
        raise UserError(f"{rest[0]!r} is not a flag; write --config.KEY=VALUE to set a key")
    if not known.workdir and known.mode != "plan":
        raise UserError("--workdir is missing; name the directory of the run")
    if not known.topology and known.mode == "plan":
        raise UserError(f"--topology is missing; for example --topology={TOPOLOGIES[0]}")
    return Arguments(c, known.workdir, known.mode, known.topology)


def dispatch(arguments: Arguments) -> None:
    """Run what the mode names."""
    c, workdir = arguments.config, arguments.workdir
    if arguments.mode == "plan":
        from stoa_jax import plan

        plan.prepare(arguments.topology)
        print(plan.report(c, arguments.topology))
    elif arguments.mode == "eval":
        from stoa_jax import evaluate

        evaluate.run(c, workdir)
    elif arguments.mode == "calibrate":
        from stoa_jax import calibrate

        calibrate.run(c, workdir)
    else:
        from stoa_jax import train

        train.train(c, workdir, profile=arguments.mode == "profile")


def guarded(work: Callable[[], Any], distributed: bool = True) -> None:
    """Run `work`, on all hosts if there are several; errors become one line and an exit code."""
    from stoa_jax.train import TrainingError

    try:
        if distributed:
            start_distributed()
        work()
    except UserError as error:
        fail(error, 2)
    except TrainingError as error:
        fail(error, 1)
    except KeyboardInterrupt:
        leave(130)
    except Exception:  # the outermost boundary: print it, then leave as after other errors
        traceback.print_exc()
        leave(1)


def start_distributed() -> None:
    """Join the other processes if the environment names any.

    JAX recognises Slurm, TPU pods and JobSets. Elsewhere, set JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    env = os.environ
    several = (
        int(env.get("JAX_NUM_PROCESSES", "1")) > 1
        or int(env.get("SLURM_NTASKS", "1")) > 1
        or len(env.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1
    )
    if not several or jax.distributed.is_initialized():
        return
    jax.config.update("jax_enable_preemption_service", True)
    settings: dict[str, Any] = {}
    if "JAX_NUM_PROCESSES" in env:
        settings = dict(
            coordinator_address=env.get("JAX_COORDINATOR_ADDRESS"),
            num_processes=int(env["JAX_NUM_PROCESSES"]),
            process_id=int(env["JAX_PROCESS_ID"]),
        )
    jax.distributed.initialize(heartbeat_timeout_seconds=PEER_LOST_SECONDS, **settings)


def fail(error: Exception, code: int) -> None:
    """Print the error as one line and exit."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    leave(code)


def leave(code: int) -> None:
    """Exit without waiting for peers, which may be gone or waiting for this process."""
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.distributed.is_initialized():
        os._exit(code)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
