"""Checkpoints of a run: Orbax, asynchronous, atomic, restored on any number of devices.

`WORKDIR/checkpoints/STEP/` holds three items: `params` and `optimizer`, nested as the parameters'
names are, and `meta`, JSON: the place in the data, counters, checksums of every array, and the
configuration of the model.
"""

import errno
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers

from stoa_jax.errors import UserError

FOLDER = "checkpoints"
_FULL = ("No space left", "ENOSPC", "RESOURCE_EXHAUSTED", "Disk quota", "EDQUOT", "File too large")


class Checkpoints:
    """The checkpoints of one work directory. Every process calls every method."""

    def __init__(self, workdir: str | Path, c: ConfigDict):
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
        """Is one being written?"""
        return self._manager.is_saving_in_progress()

    def steps(self) -> list[int]:
        """The steps there are complete checkpoints of."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        params: Mapping[str, jax.Array],
        optimizer: Mapping[str, jax.Array],
        meta: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Copy the arrays off the devices and write them behind the run's back."""
        if step in self._manager.all_steps():
            return
        sums = {**checksums(params), **checksums(optimizer, "optimizer:")}
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(_nest(params)),
            optimizer=ocp.args.StandardSave(_nest(optimizer)),
            meta=ocp.args.JsonSave({**meta, "step": step, "checksums": sums}),
        )
        self.wait()  # for the one before, so that an error is put down to the right step
        self._writing = step
        self._guard(
            lambda: self._manager.save(step, args=args, metrics=dict(metrics or {}) or None)
        )

    def wait(self) -> None:
        """Until what was begun is on the disk."""
        self._guard(self._manager.wait_until_finished)

    def check(self) -> None:
        """Raise what went wrong in the background, if anything did."""
        self._guard(self._manager.check_for_errors)

    def close(self) -> None:
        """Wait, and let go."""
        self.wait()
        self._manager.close()

    def restore(
        self, params: Mapping[str, Any], optimizer: Mapping[str, Any]
    ) -> tuple[int, dict[str, jax.Array], dict[str, jax.Array], dict[str, Any]] | None:
        """The newest good checkpoint, laid out as the abstract arrays say; None: there is none.

        One that cannot be read or whose checksums differ is named, set aside, and the one before
        it is used.
        """
        while steps := self.steps():
            step = steps[-1]
            try:
                found = self._restore(step, params, optimizer)
                problem = ""
            except UserError:
                raise
            except Exception as error:
                # Orbax, TensorStore and zstd have a zoo of errors for damaged files.
                problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            problem = _any_process(problem)
            if not problem:
                return found
            aside = self._set_aside(step)
            logging.error(
                "checkpoint %d is damaged (%s); set aside as %s, using the one before it",
                step,
                problem,
                aside,
            )
        return None

    def _restore(self, step: int, params: Mapping[str, Any], optimizer: Mapping[str, Any]):
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        sums = meta["meta"].pop("checksums")
        wanted = {*params, *(f"optimizer:{name}" for name in optimizer)}
        if set(sums) != wanted:
            odd = sorted(set(sums) ^ wanted)
            raise UserError(
                f"checkpoint {self.folder / str(step)} holds another model or optimizer: "
                f"{len(odd)} name(s) differ, the first {odd[0]!r}; use another --workdir"
            )
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(_nest(params)),
            optimizer=ocp.args.StandardRestore(_nest(optimizer)),
        )
        found = self._manager.restore(step, args=args)
        arrays = _flat(found["params"]), _flat(found["optimizer"])
        now = {**checksums(arrays[0]), **checksums(arrays[1], "optimizer:")}
        for name, value in now.items():
            if value != sums[name]:
                raise ValueError(f"the checksum of {name} differs")
        return step, *arrays, meta["meta"]

    def _set_aside(self, step: int) -> Path:
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
        except Exception as error:
            if not _disk_full(error):
                raise
            good = [step for step in self.steps() if step != self._writing]
            raise UserError(
                f"checkpoint {self._writing} could not be written, no space left for "
                f"{self.folder}; the last good one is {f'of step {good[-1]}' if good else 'none'}; "
                "free some space and run the same command again"
            ) from error


def load_params(
    workdir: str | Path, step: int | None = None
) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Any]]:
    """Parameters by name on the host, the model's configuration and the rest of the metadata.

    Of the work directory's newest checkpoint, or of `step`.
    """
    folder = Path(workdir).absolute() / FOLDER
    steps = sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())
    if not steps:
        raise UserError(f"{workdir}: no checkpoint in {folder}; is this a run's --workdir?")
    if step is not None and step not in steps:
        raise UserError(f"{workdir}: no checkpoint of step {step}; there are {steps}")
    folder = folder / str(steps[-1] if step is None else step)
    try:
        meta = json.loads((folder / "meta" / "metadata").read_text())
        handler = ocp.PyTreeCheckpointHandler()
        with ocp.Checkpointer(handler) as reader:
            tree = reader.metadata(folder / "params").item_metadata.tree
            args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            params = _flat(
                reader.restore(
                    folder / "params", args=ocp.args.PyTreeRestore(tree, restore_args=args)
                )
            )
        sums = meta.pop("checksums")
        for name, value in params.items():
            if _checksum_numpy(value) != sums[name]:
                raise ValueError(f"the checksum of {name} differs")
    except Exception as error:
        line = str(error).strip().splitlines()[:1]
        raise UserError(f"checkpoint {folder} is damaged: {line}; name an older step") from error
    return params, meta.pop("model"), meta


def flatten(tree: Any) -> dict[str, Any]:
    """Any state as {path: leaf}, the path's parts joined by "/"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(_part(key) for key in path): leaf for path, leaf in leaves}


def unflatten(like: Any, flat: Mapping[str, Any]) -> Any:
    """The state that `flatten` took apart."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(like)
    return tree.unflatten([flat["/".join(_part(key) for key in path)] for path, _ in leaves])


def checksums(arrays: Mapping[str, jax.Array], prefix: str = "") -> dict[str, int]:
    """A number for each array that depends on every bit and its place, not on the sharding."""
    return {prefix + name: int(value) for name, value in jax.device_get(_sums(arrays)).items()}


@jax.jit
def _sums(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _sum(x, jnp) for name, x in arrays.items()}


def _sum(x, xp):
    # Integers modulo 2^32 add up to the same in any order, so on any number of devices.
    if x.dtype.itemsize == 4:
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32) if xp is jnp else x.view(np.uint32)
    else:
        bits = x.astype(xp.uint32)
    place = xp.arange(x.size, dtype=xp.uint32).reshape(x.shape)
    return xp.sum(bits * (2 * place + 1), dtype=xp.uint32)


def _checksum_numpy(x: np.ndarray) -> int:
    return int(_sum(np.ascontiguousarray(x).reshape(x.shape), np))


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


def _any_process(problem: str) -> str:
    """The first problem that any process has."""
    if jax.process_count() == 1:
        return problem
    mine = np.frombuffer(problem.encode()[:256].ljust(256), np.uint8)
    for row in np.asarray(multihost_utils.process_allgather(mine)):
        if text := row.tobytes().decode(errors="replace").strip():
            return text
    return ""


def _disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EFBIG,
        ):
            return True
        if any(sign in str(error) for sign in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False
