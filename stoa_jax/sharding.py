"""The sharding of every array: a mesh with the axes data, fsdp and tensor, and rules by name.

The batch is split over data and fsdp. A parameter is split over tensor where a rule says so, and
over fsdp along its largest dimension that fsdp divides. The optimizer's state is split like its
parameter.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from stoa_jax import optim
from stoa_jax.errors import UserError

if TYPE_CHECKING:  # the step itself needs JAX, Flax and Optax only
    from ml_collections import ConfigDict

HasShape = jax.Array | jax.ShapeDtypeStruct

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# (regex over names, the dimension that the tensor axis splits, or None). Blocks are stacked on a
# leading depth axis: qkv/kernel is [depth, h, 3, heads, head], mlp/up/kernel [depth, h, 4h].
RULES: tuple[tuple[str, int | None], ...] = (
    (r"blocks/attention/qkv/kernel$", 3),
    (r"blocks/attention/qkv/bias$", 2),
    (r"blocks/attention/out/kernel$", 1),
    (r"blocks/mlp/up/(kernel|bias)$", -1),
    (r"blocks/mlp/down/kernel$", 1),
    (r".*", None),
)

# Splitting a smaller array over fsdp costs more in messages than it saves in memory.
FSDP_MIN_SIZE = 2**14


def mesh_shape(c: "ConfigDict", num_devices: int) -> tuple[int, int, int]:
    """Return the sizes of the mesh axes; -1 takes all remaining devices."""
    sizes = [int(c.mesh[axis]) for axis in AXES]
    given = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(f"config.mesh: {given}; sizes must be 1 or more, and one of them may be -1")
    if -1 in sizes:
        fixed = int(np.prod([size for size in sizes if size != -1]))
        if num_devices % fixed:
            raise UserError(
                f"config.mesh: {given} does not divide {num_devices} device(s); "
                f"choose sizes whose product divides {num_devices}"
            )
        sizes[sizes.index(-1)] = num_devices // fixed
    if int(np.prod(sizes)) != num_devices:
        raise UserError(
            f"config.mesh: {given} needs {int(np.prod(sizes))} device(s), there are "
            f"{num_devices}; set one of the axes to -1"
        )
    data, fsdp, tensor = sizes
    return data, fsdp, tensor


def make_mesh(c: "ConfigDict", devices: Sequence[Any] | None = None) -> Mesh:
    """Build the mesh over all devices of all processes, or over `devices`."""
    shape = mesh_shape(c, len(devices) if devices is not None else jax.device_count())
    if devices is None and shape[2] > jax.local_device_count():
        raise UserError(
            f"config.mesh.tensor: {shape[2]} is more than the {jax.local_device_count()} "
            "device(s) of one process; tensor splits within a host only, use fsdp across hosts"
        )
    # Auto leaves the intermediate shardings to the compiler. jax 0.10 defaults to Explicit.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def check_batch(c: "ConfigDict", mesh: Mesh, evaluation: bool = True) -> None:
    """Raise UserError unless every device gets equally many clips of every micro-batch."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    sizes = [("train.batch_size", c.train.batch_size, c.train.accumulate)]
    if evaluation:
        sizes.append(("eval.batch_size", c.eval.batch_size, 1))
    for key, size, parts in sizes:
        if parts < 1 or size < 1 or size % (shards * parts):
            by = f"{shards} device(s)" + (f" times train.accumulate {parts}" if parts > 1 else "")
            near = max(size // (shards * max(parts, 1)), 1) * shards * max(parts, 1)
            raise UserError(f"config.{key}: {size} is not divisible by {by}; use {near}")


def param_specs(shapes: Mapping[str, HasShape], mesh: Mesh) -> dict[str, PartitionSpec]:
    """Return how each parameter is split over the mesh."""
    dims, _ = optim.first_match(RULES, shapes, "sharding rules")
    return {name: _spec(name, shapes[name].shape, dims[name], mesh) for name in shapes}


def _spec(name: str, shape: tuple[int, ...], dim: int | None, mesh: Mesh) -> PartitionSpec:
    spec: list[str | None] = [None] * len(shape)
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    if tensor > 1 and dim is not None:
        if shape[dim] % tensor:
            raise UserError(
                f"config.mesh.tensor: {tensor} does not divide dimension {dim % len(shape)} of "
                f"{name} {shape}; use a divisor of {shape[dim]}"
            )
        spec[dim] = "tensor"
    if fsdp > 1 and np.prod(shape) >= FSDP_MIN_SIZE:
        # The depth axis stays whole, because the scan over layers slices it.
        first = 1 if re.search(r"blocks/", name) else 0
        free = [i for i in range(first, len(shape)) if spec[i] is None and shape[i] % fsdp == 0]
        if free:
            spec[max(free, key=lambda i: shape[i])] = "fsdp"
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)


def state_shardings(state: Any, specs: Mapping[str, PartitionSpec], mesh: Mesh) -> Any:
    """Return the shardings of a train state; a leaf under a parameter's name is split like it."""

    def leaf_sharding(path, leaf) -> NamedSharding:
        key = getattr(path[-1], "key", None) if path else None
        spec = specs.get(key, PartitionSpec()) if isinstance(key, str) else PartitionSpec()
        return NamedSharding(mesh, spec if len(spec) <= len(leaf.shape) else PartitionSpec())

    return jax.tree_util.tree_map_with_path(leaf_sharding, state)


def gathered(shardings: Mapping[str, NamedSharding]) -> dict[str, NamedSharding]:
    """Return the same shardings without the fsdp axis: the form in which a step uses parameters."""

    def without_fsdp(spec: PartitionSpec) -> PartitionSpec:
        return PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec))

    return {name: NamedSharding(s.mesh, without_fsdp(s.spec)) for name, s in shardings.items()}


def constrain(
    arrays: Mapping[str, jax.Array], shardings: Mapping[str, NamedSharding]
) -> dict[str, jax.Array]:
    """Constrain arrays to shardings by name, inside jit."""
    return {
        name: jax.lax.with_sharding_constraint(value, shardings[name])
        for name, value in arrays.items()
    }


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding that puts a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding that splits the rows of a batch over the devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def to_devices(batch: Mapping[str, np.ndarray], mesh: Mesh, size: int) -> dict[str, jax.Array]:
    """Assemble a global batch of `size` rows from the rows that each process holds."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows, (size, *rows.shape[1:]))
        for name, rows in batch.items()
    }
