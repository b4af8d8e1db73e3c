"""Checks before a run starts: a valid configuration, and a work directory that belongs to it."""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

from stoa_jax import config, files, locks, migrations
from stoa_jax.errors import UserError
from stoa_jax.ops import choose_attention

# Keys that may change when a run is continued: where it runs, and what it writes.
MAY_CHANGE = (
    *("mesh.", "log.", "faults.", "checkpoint.", "eval.", "data.dir", "data.workers"),
    *("data.prefetch", "data.cache", "data.live_dir"),
    *("model.scan_layers", "model.remat", "model.attention"),
)


def check_config(c: ConfigDict) -> None:
    """Raise UserError for the first value in the configuration that is out of range."""
    model = config.model_config(c)
    if model.attention == "cudnn":
        choose_attention(
            "cudnn",
            dtype=model.dtype,
            heads=model.vision_heads,
            head_width=model.vision_width // model.vision_heads,
        )
    try:
        re.compile(c.init.reinit)
    except re.error as error:
        raise UserError(
            f"config.init.reinit: {c.init.reinit!r} is not a regular expression ({error})"
        ) from None
    if c.train.steps < 1 and c.train.epochs <= 0:
        raise UserError(f"config.train.steps: {c.train.steps}; set it, or train.epochs, above 0")
    for key, least in (
        ("log.every_steps", 1),
        ("checkpoint.every_steps", 0),
        ("eval.every_steps", -1),
        ("faults.max_nonfinite", 1),
        ("faults.max_rollbacks", 0),
    ):
        section, name = key.split(".")
        if c[section][name] < least:
            raise UserError(f"config.{key}: {c[section][name]}; it must be at least {least}")


def config_json(c: ConfigDict) -> dict[str, Any]:
    """Return the configuration as plain JSON values (tuples become lists)."""
    return json.loads(json.dumps(c.to_dict()))


def flat_config(c: ConfigDict | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested sections into dotted keys: `{"train.steps": 1000, …}`."""
    flat: dict[str, Any] = {}
    for key, value in c.items():
        if isinstance(value, ConfigDict | Mapping):
            flat.update(flat_config(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def claim_workdir(c: ConfigDict, workdir: Path) -> None:
    """Raise UserError unless the work directory is writable and holds no other configuration.

    Creates the directory. `write_config` marks it later, once the run is known to start.
    """
    if "://" in str(workdir) or ":/" in str(workdir):
        raise UserError(
            f"--workdir: {workdir} is a URL; mount the bucket (for example with gcsfuse) and name "
            "the mounted directory"
        )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".probe-{os.getpid()}-{jax.process_index()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--workdir: {workdir} cannot be written ({error.strerror}); name another directory"
        ) from error
    path = workdir / "config.json"
    if not path.exists():
        return
    old = migrations.migrate_flat_config(flat_config(json.loads(path.read_text())))
    new = flat_config(config_json(c))
    # An older version did not write the keys that came later; they count as their defaults.
    old = {**flat_config(config_json(config.default(c.task))), **old}
    differing = [
        f"{key} {old.get(key)!r} → {new.get(key)!r}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key) and not key.startswith(MAY_CHANGE)
    ]
    if differing:
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise UserError(
            f"--workdir: {workdir} holds the run of another configuration: "
            f"{'; '.join(differing[:4])}{more}; name another directory"
        )


@contextlib.contextmanager
def only_training(workdir: Path) -> Iterator[None]:
    """Raise UserError if another process trains in the work directory; lock it meanwhile."""
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            try:
                stack.enter_context(locks.exclusive(workdir / "lock", "training"))
            except OSError as error:
                logging.warning(
                    "%s cannot be locked (%s); do not start a second training in it",
                    workdir,
                    error.strerror,
                )
        yield


def write_config(c: ConfigDict, workdir: Path) -> None:
    """Write config.json, which marks the work directory as belonging to this configuration."""
    if jax.process_index() == 0:
        path, content = workdir / "config.json", config_json(c)
        try:
            if path.exists() and json.loads(path.read_text()) == content:
                return  # a run that continues needs no space for it
            files.write_json(path, content)
        except OSError as error:
            raise UserError(
                f"--workdir: {workdir}/config.json cannot be written ({error.strerror}); free some "
                "space and run the same command again"
            ) from error
