"""The entry point: flags, distributed start, dispatch on the mode.

python -m stoa_jax.main --config=configs/pretrain.py:synthetic --workdir=runs/demo
python -m stoa_jax.main --config=… --workdir=… --config.train.steps=200   # any key
python -m stoa_jax.main --config=… --mode=plan --topology=v5e:16x16
"""

import dataclasses
import difflib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from stoa_jax import config
from stoa_jax.errors import UserError

MODES = ("train", "eval", "plan", "profile")
TOPOLOGIES = ("v5e:16x16", "v5p:4x4x8", "v6e:16x16", "gpu:8", "cpu:8")
PEER_LOST_SECONDS = 30  # without a sign of life of a peer, the others end


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What the command line says."""

    config: ConfigDict
    workdir: str
    mode: str
    topology: str


def main() -> None:
    """Parse, start, dispatch."""
    flags.FLAGS.mark_as_parsed()  # grain and tfds read absl's own
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)
    try:
        arguments = parse()
    except UserError as error:
        fail(error, 2)
    guarded(lambda: dispatch(arguments), distributed=arguments.mode != "plan")


def parse() -> Arguments:
    """`sys.argv`, which ml_collections reads too; anything wrong with it is one line."""
    argv = sys.argv
    known = flags.FlagValues()
    experiment = config_flags.DEFINE_config_file(
        "config", None, "The experiment: a file of configs/, FILE.py:ARGUMENT.", flag_values=known
    )
    flags.DEFINE_string("workdir", "", "Where checkpoints and metrics go.", flag_values=known)
    flags.DEFINE_enum("mode", "train", MODES, "What to do.", flag_values=known)
    flags.DEFINE_string(
        "topology", "", f"Of --mode=plan: {', '.join(TOPOLOGIES)}.", flag_values=known
    )
    if any(arg in ("-h", "--help", "--helpfull") for arg in argv[1:]):
        print(f"{__doc__}\n{known}")
        raise SystemExit(0)
    try:
        rest = known(list(argv))[1:]
        c = experiment.value
        if c is not None:
            config.model_config(c)  # a file that could not be read says so only here
    except UserError:
        raise
    except Exception as error:
        # absl and ml_collections wrap what a configuration file raises.
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, UserError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        raise UserError(_flag_mistake(argv, error)) from error
    if rest:
        raise UserError(f"{rest[0]!r} is not a flag; write --config.KEY=VALUE to set a key")
    if c is None:
        raise UserError("--config is missing; for example --config=configs/pretrain.py:synthetic")
    if not known.workdir and known.mode != "plan":
        raise UserError("--workdir is missing; name the directory of the run")
    if not known.topology and known.mode == "plan":
        raise UserError(f"--topology is missing; for example --topology={TOPOLOGIES[0]}")
    return Arguments(c, known.workdir, known.mode, known.topology)


def _flag_mistake(argv: Sequence[str], error: Exception) -> str:
    """One line for what absl or ml_collections says in ten, with the nearest existing key."""
    text = " ".join(str(error).split())
    if missing := re.search(r"No such file or directory: '([^']+)'", text):
        return f"--config: there is no file {missing[1]}"
    path = next((a.split("=", 1)[1] for a in argv if a.startswith("--config=")), "")
    for arg in argv[1:]:
        if not arg.startswith("--config."):
            continue
        key = arg.removeprefix("--config.").split("=")[0]
        known = known_keys()
        if key not in known:
            return f"--config.{key}: no such key{_nearest(key, known)}"
    found = re.search(r"Key \"?'?(\w+)'?\"? (?:does not exist|not found)", text) or re.search(
        r"'(\w+)'", text
    )
    if isinstance(error, AttributeError | KeyError) and found:
        known = {name for full in known_keys() for name in full.split(".")}
        return f"{path}: no configuration key {found[1]!r}{_nearest(found[1], known)}"
    return f"{path + ': ' if path else ''}{text[:300]}"


def known_keys() -> list[str]:
    """Every key that a configuration has."""
    from stoa_jax.workdir import flat_config

    keys = list(flat_config(config.default()))
    return keys + sorted({key.rpartition(".")[0] for key in keys} - {""})


def _nearest(key: str, known: Any) -> str:
    close = difflib.get_close_matches(key, list(known), 1, cutoff=0.5)
    if not close:  # the right name in the wrong section
        last = key.split(".")[-1]
        names = {name.split(".")[-1]: name for name in known}
        close = [names[n] for n in difflib.get_close_matches(last, names, 1, cutoff=0.6)]
    return f"; the nearest is {close[0]!r}" if close else ""


def dispatch(arguments: Arguments) -> None:
    """Do what the mode says."""
    c, workdir = arguments.config, arguments.workdir
    if arguments.mode == "plan":
        from stoa_jax import plan

        plan.prepare(arguments.topology)
        print(plan.report(c, arguments.topology))
    elif arguments.mode == "eval":
        from stoa_jax import evaluate

        evaluate.run(c, workdir)
    else:
        from stoa_jax import train

        train.train(c, workdir, profile=arguments.mode == "profile")


def guarded(work: Callable[[], Any], distributed: bool = True) -> None:
    """Run it, on all hosts if there are several; errors become one line and an exit code."""
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
    except Exception:
        traceback.print_exc()
        leave(1)


def start_distributed() -> None:
    """Join the other processes, where the environment says that there are any.

    Slurm, TPU pods and JobSets are recognised by JAX; elsewhere JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID say it.
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
    """One line, and out."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    leave(code)


def leave(code: int) -> None:
    """Exit; without the peers' consent, since they may be gone or waiting for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.distributed.is_initialized():
        os._exit(code)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
