"""Outputs of a frozen vision tower for every training clip, computed once and kept in memory.

A training step then starts after the tower. The outputs are float16, a few KB per clip for small
models. With `data.live_dir`, they are also written there, and later runs with the same tower and
the same clips read them. T frames, P patches, h vision width, d shared width.
"""

import hashlib
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from stoa_jax.data import resize
from stoa_jax.data.synthetic import stored
from stoa_jax.errors import UserError
from stoa_jax.models import parameters
from stoa_jax.models.stoa import Stoa

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from stoa_jax.data.split import Split
    from stoa_jax.tasks import Task

_CLIPS = 64  # clips per batch
# Settings that change the tower's outputs.
_SETTINGS = ("image_size", "patch_size", "vision_heads", "activation", "dtype", "joint_blocks")


class KeptVision:
    """Rows of `seen/frames` [n, T, d] and `seen/block i` [n, T, 1 + P, h], by clip."""

    def __init__(self, rows: dict[str, np.ndarray]):
        self.rows = rows

    @classmethod
    def of(cls, model: Stoa, task: "Task") -> "KeptVision":
        """Run the tower of `model` over the training clips of `task`."""
        from stoa_jax.data import pipeline

        c = task.config
        began = time.monotonic()
        split = task.open_split(task.train_set, c.data.train_split)
        path = file_for(model, split, c.data.live_dir)
        if path and path.exists():
            print(f"reading the vision tower's outputs from {path}", file=sys.stderr, flush=True)
            return cls(stored.load(path))
        spec = task.batch_spec(train=False)
        loader = pipeline.Loader(split, spec, batch_size=_CLIPS, train=False, cache="off")
        see = jax.jit(lambda pixels: model.encode_frames(pixels))
        rows: dict[str, np.ndarray] = {}
        at = 0
        for batch in loader:
            seen = see(batch["pixels"])
            count = int(batch["valid"].sum())
            for name, x in (("frames", seen.frames), *seen.taps.items()):
                if name not in rows:
                    rows[name] = np.empty((len(split), *x.shape[1:]), np.float16)
                rows[name][at : at + count] = np.asarray(x[:count], np.float16)
            at += count
        size = sum(x.nbytes for x in rows.values()) / 2**20
        took = time.monotonic() - began
        print(
            f"stored the vision tower's outputs for {at} clips: {size:.0f} MiB, {took:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        kept = cls({f"seen/{name}": x for name, x in rows.items()})
        if path:
            stored.save(path, kept.rows)
        return kept

    def add_to(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the batch with the stored rows of its clips, which `index` names."""
        return {**batch, **{name: x[batch["index"]] for name, x in self.rows.items()}}


def file_for(model: Stoa, split: "Split", folder: str) -> Path | None:
    """Return the file in `folder` for the outputs of this tower for these clips.

    The name depends on the tower's weights, settings and code, and on what decides the clips of a
    live split. None: there is no folder, or the split is not live.
    """
    from stoa_jax.data.synthetic import live

    if not folder or not isinstance(split, live.LiveSplit):
        return None
    weights = hashlib.sha256()
    for name, value in parameters.named_parameters(model).items():
        if name.startswith("visual/"):
            weights.update(name.encode() + np.asarray(value).tobytes())
    settings = {name: getattr(model.config, name) for name in _SETTINGS}
    code = [Path(parameters.__file__).parent, Path(resize.__file__), Path(__file__)]
    name = stored.digest(code, weights.hexdigest(), settings, model.tapped, split.stored_name)
    return Path(folder) / f"vision-{name}.npz"


def check_keeps(c: "ConfigDict", rates: Mapping[str, float]) -> None:
    """Raise UserError if the configuration would make the stored outputs wrong."""
    wrong = ""
    if any(rate > 0 for name, rate in rates.items() if name.startswith("visual/")):
        wrong = "the vision tower is trained; freeze it with optim.groups"
    elif c.data.crop != "center" or c.data.flip:
        wrong = "crops differ from step to step; set data.crop=center and data.flip=false"
    elif len(c.data.sets) != 1:
        wrong = f"data.sets mixes {len(c.data.sets)} sets; name one"
    if wrong:
        raise UserError(f"config.train.keep_vision: {wrong}")
