"""Checkpoints of a run: written by Orbax in the background, atomic, restored on any device count.

`WORKDIR/checkpoints/STEP/` holds three items. `params` and `optimizer` are trees nested by the
parts of the parameters' names. `meta` is JSON: the position in the data, counters, a checksum of
every array, and the model's configuration.
"""

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from stoa_jax import migrations
from stoa_jax.errors import UserError

if TYPE_CHECKING:  # loading a checkpoint for inference needs no configuration
    from ml_collections import ConfigDict

FOLDER = "checkpoints"
_OPTIMIZER = "optimizer:"  # prefix of the optimizer's names among the checksums
_DISK_FULL = (
    "No space left",
    "ENOSPC",
    "RESOURCE_EXHAUSTED",
    "Disk quota",
    "EDQUOT",
    "File too large",
)


class Checkpoints:
    """The checkpoints of one work directory. Every process must call every method."""

    def __init__(self, workdir: str | Path, c: "ConfigDict"):
        self.folder = Path(workdir).absolute() / FOLDER
        metric = c.checkpoint.best_metric
        if c.checkpoint.best_mode not in ("max", "min"):
            raise UserError(
                f"config.checkpoint.best_mode: {c.checkpoint.best_mode!r}; use max or min"
            )
        if c.checkpoint.keep < 1:
            raise UserError(f"config.checkpoint.keep: {c.checkpoint.keep}; keep at least 1")
        policies: list[Any] = [checkpoint_managers.LatestN(c.checkpoint.keep)]
        if metric:
            best = checkpoint_managers.BestN(
                get_metric_fn=lambda metrics: metrics[metric],
                reverse=c.checkpoint.best_mode == "min",
                n=1,
                keep_checkpoints_without_metrics=False,
            )
            policies.append(best)
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=self._options)
        self._writing: int | None = None

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._manager.is_saving_in_progress()

    def steps(self) -> list[int]:
        """Return the steps that have a complete checkpoint, in order."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        params: Mapping[str, jax.Array],
        optimizer: Mapping[str, jax.Array],
        meta: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Copy the arrays to the host, and write them to disk in the background."""
        if step in self._manager.all_steps():
            return
        sums = {**checksums(params), **checksums(optimizer, _OPTIMIZER)}
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(_nest(params)),
            optimizer=ocp.args.StandardSave(_nest(optimizer)),
            meta=ocp.args.JsonSave({**meta, "step": step, "checksums": sums}),
        )
        self.wait()  # for the previous save, so that its error is not blamed on this step
        self._writing = step
        self._guard(
            lambda: self._manager.save(step, args=args, metrics=dict(metrics or {}) or None)
        )

    def wait(self) -> None:
        """Wait until the save in progress is on disk."""
        self._guard(self._manager.wait_until_finished)

    def check(self) -> None:
        """Raise the error of a failed background save, if there was one."""
        self._guard(self._manager.check_for_errors)

    def close(self) -> None:
        """Wait for the save in progress, and release the directory."""
        self.wait()
        self._manager.close()

    def restore(
        self, params: Mapping[str, Any], optimizer: Mapping[str, Any]
    ) -> tuple[int, dict[str, jax.Array], dict[str, jax.Array], dict[str, Any]] | None:
        """Restore the newest intact checkpoint as (step, params, optimizer, meta), or return None.

        The abstract arrays say which names to expect, and how to shard them. A checkpoint that
        cannot be read, or whose checksums differ, is logged and renamed, and the one before it is
        tried.
        """
        while steps := self.steps():
            step = steps[-1]
            try:
                restored = self._restore(step, params, optimizer)
                problem = ""
            except UserError:
                raise
            except Exception as error:
                # Orbax, TensorStore and zstd raise many types of error for damaged files.
                if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                    raise  # the machine is too small; the files are intact
                restored = None
                problem = _one_line(error)
            problem = _first_problem(problem)
            if not problem:
                return restored
            moved = self._set_aside(step)
            logging.error(
                "checkpoint %d is damaged (%s); moved to %s, using the one before it",
                step,
                problem,
                moved,
            )
        return None

    def _restore(
        self, step: int, params: Mapping[str, Any], optimizer: Mapping[str, Any]
    ) -> tuple[int, dict[str, jax.Array], dict[str, jax.Array], dict[str, Any]]:
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        sums = meta["meta"].pop("checksums")
        saved = _saved_names([*params, *(_OPTIMIZER + name for name in optimizer)], sums)
        differing = sorted(set(sums) ^ set(saved.values()))
        if differing:
            raise UserError(
                f"checkpoint {self.folder / str(step)} holds another model or optimizer: "
                f"{len(differing)} name(s) differ, the first {differing[0]!r}; use another "
                "--workdir"
            )
        saved_optimizer = {n: saved[_OPTIMIZER + n].removeprefix(_OPTIMIZER) for n in optimizer}
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(_nest({saved[n]: x for n, x in params.items()})),
            optimizer=ocp.args.StandardRestore(
                _nest({saved_optimizer[n]: x for n, x in optimizer.items()})
            ),
        )
        trees = self._manager.restore(step, args=args)
        arrays, moments = _flat(trees["params"]), _flat(trees["optimizer"])
        for name, value in {**checksums(arrays), **checksums(moments, _OPTIMIZER)}.items():
            if value != sums[name]:
                raise ValueError(f"the checksum of {name} differs")
        return (
            step,
            {name: arrays[saved[name]] for name in params},
            {name: moments[saved_optimizer[name]] for name in optimizer},
            meta["meta"],
        )

    def _set_aside(self, step: int) -> Path:
        """Rename a damaged checkpoint, so that it is kept but never restored."""
        aside = self.folder.parent / f"damaged-checkpoint-{step}"
        self._manager.close()
        if jax.process_index() == 0:
            number = 0
            while aside.exists():
                number += 1
                aside = aside.with_name(f"damaged-checkpoint-{step}.{number}")
            os.rename(self.folder / str(step), aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"aside {step}")
        self._manager = ocp.CheckpointManager(self.folder, options=self._options)
        return aside

    def _guard(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:  # Orbax wraps the OSError of a full disk in several types
            if not _disk_full(error):
                raise
            intact = [step for step in self.steps() if step != self._writing]
            last = f"the last complete one is step {intact[-1]}" if intact else "there is none yet"
            raise UserError(
                f"checkpoint {self._writing} could not be written: no space left for "
                f"{self.folder}; {last}; free some space and run the same command again"
            ) from error


def load_params(
    workdir: str | Path, step: int | None = None
) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Any]]:
    """Load a checkpoint to the host as (parameters by name, the model's fields, other metadata).

    Reads the newest checkpoint of the work directory, or that of `step`. Names and fields are
    the current ones, even if an older version wrote the checkpoint.
    """
    folder = Path(workdir).absolute() / FOLDER
    steps = sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())
    if not steps:
        raise UserError(f"{workdir}: no checkpoint in {folder}; is this a run's --workdir?")
    if step is not None and step not in steps:
        raise UserError(f"{workdir}: no checkpoint of step {step}; available steps: {steps}")
    folder = folder / str(steps[-1] if step is None else step)
    try:
        meta = json.loads((folder / "meta" / "metadata").read_text())
        # A Checkpointer would warn that this part of a checkpoint has no metadata of its own.
        saved: Any = folder / "params"  # Orbax accepts any path, but declares its own type
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            tree = handler.metadata(saved).tree
            args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            params = _flat(
                handler.restore(saved, args=ocp.args.PyTreeRestore(tree, restore_args=args))
            )
        sums = meta.pop("checksums")
        for name, value in params.items():
            if _checksum_numpy(value) != sums[name]:
                raise ValueError(f"the checksum of {name} differs")
    except Exception as error:  # damaged files raise many types of error, as in `restore`
        raise UserError(
            f"checkpoint {folder} is damaged ({_one_line(error)}); name an older step"
        ) from error
    params = {migrations.migrate_parameter_name(name): x for name, x in params.items()}
    return params, migrations.migrate_model_fields(meta.pop("model")), meta


def flatten(tree: Any) -> dict[str, Any]:
    """Flatten any pytree to {path: leaf}, with the parts of a path joined by "/"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(_part(key) for key in path): leaf for path, leaf in leaves}


def unflatten(like: Any, flat: Mapping[str, Any]) -> Any:
    """Rebuild a pytree of the structure of `like` from what `flatten` returned."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(like)
    return tree.unflatten([flat["/".join(_part(key) for key in path)] for path, _ in leaves])


def checksums(arrays: Mapping[str, Any], prefix: str = "") -> dict[str, int]:
    """Return a checksum of each array that depends on every bit but not on the sharding."""
    return {prefix + name: int(value) for name, value in jax.device_get(_sums(arrays)).items()}


@jax.jit
def _sums(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _sum(x, jnp) for name, x in arrays.items()}


def _sum(x, xp):
    # A sum modulo 2^32 does not depend on the order of its terms, so not on the device count.
    if x.dtype.itemsize == 4:
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32) if xp is jnp else x.view(np.uint32)
    else:
        bits = x.astype(xp.uint32)
    position = xp.arange(x.size, dtype=xp.uint32).reshape(x.shape)
    return xp.sum(bits * (2 * position + 1), dtype=xp.uint32)


def _checksum_numpy(x: np.ndarray) -> int:
    return int(_sum(np.ascontiguousarray(x).reshape(x.shape), np))


def _saved_names(names: Sequence[str], saved: Iterable[str]) -> dict[str, str]:
    """Return the saved name of each current name; they differ if a parameter was renamed.

    The optimizer's names end in a parameter's name.
    """
    params = [name for name in saved if not name.startswith(_OPTIMIZER)]
    old = {new: name for name, new in migrations.parameter_renames(params).items()}
    if not old:
        return {name: name for name in names}
    # Try longer parameter names first, in case one name is the end of another.
    todays = sorted((n for n in names if not n.startswith(_OPTIMIZER)), key=len, reverse=True)

    def saved_name(name: str) -> str:
        if not name.startswith(_OPTIMIZER):
            return old.get(name, name)
        end = next((p for p in todays if name.endswith("/" + p)), None)
        return name if end is None else name.removesuffix(end) + old.get(end, end)

    return {name: saved_name(name) for name in names}


def _part(key: Any) -> str:
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}/"))
        else:
            flat[prefix + key] = value
    return dict(sorted(flat.items()))


def _first_problem(problem: str) -> str:
    """Return the first non-empty problem over all processes, the same on each."""
    if jax.process_count() == 1:
        return problem
    mine = np.frombuffer(problem.encode()[:256].ljust(256), np.uint8)
    for row in np.asarray(multihost_utils.process_allgather(mine)):
        if text := row.tobytes().decode(errors="replace").strip():
            return text
    return ""


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EFBIG,
        ):
            return True
        if any(sign in str(error) for sign in _DISK_FULL):
            return True
        error = error.__cause__ or error.__context__
    return False
