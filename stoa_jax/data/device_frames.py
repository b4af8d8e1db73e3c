"""Frames of a data set kept on the accelerators, and batches gathered from them there.

The frames of all clips, cropped to the centre, are one array [N, T, S, S, 3]. Its rows are sharded
over the devices like the rows of a batch, and a batch refers to its clips by row number. Every
device looks up the clips that it holds, and a reduce-scatter moves each clip to its row.
"""

import concurrent.futures
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from stoa_jax import sharding
from stoa_jax.data import clips
from stoa_jax.data.split import Split
from stoa_jax.errors import UserError

AXES = sharding.BATCH_AXES
FREE_SHARE = 0.8  # of a device's memory at most; the rest is left for the model


class DeviceFrames:
    """Frames of several splits, concatenated and sharded over the devices of a mesh."""

    def __init__(
        self,
        splits: Sequence[Split],
        spec: clips.BatchSpec,
        mesh: Mesh,
        *,
        threads: int,
        exact: bool,
    ):
        self.mesh = mesh
        ends = np.cumsum([len(split) for split in splits])
        shards = int(np.prod([mesh.shape[axis] for axis in AXES]))
        rows = -(-int(ends[-1]) // shards) * shards  # padded to equal shards
        shape = (rows, spec.frames, spec.image_size, spec.image_size, 3)
        _check_fits(mesh, int(np.prod(shape)) // shards)

        def frames_of(row: int) -> np.ndarray:
            which = int(np.searchsorted(ends, row, "right"))
            if which == len(splits):
                return np.zeros(shape[1:], np.uint8)
            index = row - (int(ends[which - 1]) if which else 0)
            return np.stack(clips.decode(splits[which], index, spec, True, exact).frames)

        def part(index: Any) -> np.ndarray:
            held = range(rows)[index[0]]
            with concurrent.futures.ThreadPoolExecutor(threads) as pool:
                return np.stack(list(pool.map(frames_of, held)))

        self.frames = jax.make_array_from_callback(shape, sharding.batch_sharding(mesh), part)

    def gather(self, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Replace `frame_row` (and `mirrored`) of a batch on the devices by its `pixels`."""
        rest = dict(batch)
        rows, mirrored = rest.pop("frame_row"), rest.pop("mirrored", None)
        rest["pixels"] = _gather(self.mesh)(self.frames, rows, mirrored)
        return rest


@functools.cache
def _gather(mesh: Mesh):
    """Return the compiled function (frames [N, ...], rows [B], mirrored [B] or None) -> pixels."""
    split = PartitionSpec(AXES)

    def local(frames: jax.Array, rows: jax.Array) -> jax.Array:
        rows = jax.lax.all_gather(rows, AXES, tiled=True)  # [B]
        at = rows - jax.lax.axis_index(AXES) * len(frames)
        held = (at >= 0) & (at < len(frames))
        found = frames[jnp.where(held, at, 0)] * held[:, None, None, None, None].astype(jnp.uint8)
        return jax.lax.psum_scatter(found, AXES, tiled=True)  # all but one of the summands are 0

    exchange = jax.shard_map(local, mesh=mesh, in_specs=(split, split), out_specs=split)

    @functools.partial(jax.jit, out_shardings=sharding.batch_sharding(mesh))
    def gather(frames: jax.Array, rows: jax.Array, mirrored: jax.Array | None) -> jax.Array:
        pixels = exchange(frames, rows)
        if mirrored is None:
            return pixels
        return jnp.where(mirrored[:, None, None, None, None], pixels[..., ::-1, :], pixels)

    return gather


def _check_fits(mesh: Mesh, needed: int) -> None:
    stats = mesh.local_devices[0].memory_stats() or {}  # None on CPUs
    limit = stats.get("bytes_limit", 0)
    free = FREE_SHARE * limit - stats.get("bytes_in_use", 0)
    if limit and needed > free:
        raise UserError(
            f"data.cache=device needs {needed / 2**30:.1f} GiB on every device, and "
            f"{max(free, 0) / 2**30:.1f} GiB are free for it; set data.cache=memory or off, or "
            "train on more devices"
        )
