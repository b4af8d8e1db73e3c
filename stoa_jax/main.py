"""The entry point: flags, distributed start, dispatch on the mode.

python -m stoa_jax.main --config=configs/pretrain.py:synthetic --workdir=runs/demo
python -m stoa_jax.main --config=… --workdir=… --config.train.steps=200   # any key
python -m stoa_jax.main --config=… --mode=plan --topology=v5e:16x16
"""

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

from stoa_jax.errors import UserError

MODES = ("train", "eval", "plan", "profile")
PEER_LOST_SECONDS = 60  # without a sign of life of a peer, the others end

_FLAGS = flags.FlagValues()
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment: a file of configs/, FILE.py:ARGUMENT.", flag_values=_FLAGS
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where checkpoints and metrics go.", flag_values=_FLAGS
)
_MODE = flags.DEFINE_enum("mode", "train", MODES, "What to do.", flag_values=_FLAGS)
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    "",
    "Of --mode=plan: v5e:16x16, v5p:4x4x8, v6e:16x16, gpu:8, cpu:8.",
    flag_values=_FLAGS,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, start, dispatch."""
    argv = list(sys.argv if argv is None else argv)
    flags.FLAGS.mark_as_parsed()  # grain and tfds read absl's own
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    try:
        c = parse(argv)
    except UserError as error:
        fail(error, 2)
    guarded(lambda: dispatch(c), c if _MODE.value in ("train", "profile", "eval") else None)


def parse(argv: Sequence[str]) -> ConfigDict:
    """The configuration that the flags spell; anything wrong with them is one line."""
    if any(arg in ("-h", "--help", "--helpfull") for arg in argv[1:]):
        print(f"{__doc__}\n{_FLAGS.main_module_help() or _FLAGS}")
        raise SystemExit(0)
    try:
        _FLAGS.unparse_flags()
        rest = _FLAGS(list(argv))[1:]
        c = _CONFIG.value
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
    if not _WORKDIR.value and _MODE.value != "plan":
        raise UserError("--workdir is missing; name the directory of the run")
    if _MODE.value == "plan" and not _TOPOLOGY.value:
        raise UserError("--topology is missing; for example --topology=v5e:16x16")
    return c


def _flag_mistake(argv: Sequence[str], error: Exception) -> str:
    """One line for what absl or ml_collections says in ten, with the nearest existing key."""
    text = " ".join(str(error).split())
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
    from stoa_jax import config
    from stoa_jax.train import flat_config

    keys = list(flat_config(config.default()))
    return keys + sorted({key.rpartition(".")[0] for key in keys} - {""})


def _nearest(key: str, known: Any) -> str:
    close = difflib.get_close_matches(key, list(known), 1, cutoff=0.5)
    if not close:  # the right name in the wrong section
        last = key.split(".")[-1]
        names = {name.split(".")[-1]: name for name in known}
        close = [names[n] for n in difflib.get_close_matches(last, names, 1, cutoff=0.6)]
    return f"; the nearest is {close[0]!r}" if close else ""


def dispatch(c: ConfigDict) -> None:
    """Do what the mode says."""
    if _MODE.value == "plan":
        from stoa_jax import plan

        print(plan.report(c, _TOPOLOGY.value))
    elif _MODE.value == "eval":
        from stoa_jax import evaluate

        evaluate.run(c, _WORKDIR.value)
    else:
        from stoa_jax import train

        train.train(c, _WORKDIR.value, profile=_MODE.value == "profile")


def guarded(work: Callable[[], Any], c: ConfigDict | None) -> None:
    """Run it, on all hosts if there are several; errors become one line and an exit code.

    With `c` None nothing distributed is started.
    """
    from stoa_jax.train import TrainingError

    code = 1
    try:
        if c is not None:
            start_distributed()
        work()
        code = 0
    except UserError as error:
        fail(error, 2)
    except TrainingError as error:
        fail(error, 1)
    except Exception:
        traceback.print_exc()
    if code:
        leave(code)


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
