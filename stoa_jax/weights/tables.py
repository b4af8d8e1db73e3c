"""The idiom of all conversions: a table of (ours, theirs, layout), read in either direction.

A name of theirs with `{}` is one tensor a block; ours are stacked on a leading depth axis.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from stoa_jax.errors import UserError
from stoa_jax.weights.tensors import TensorFile

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a tensor of theirs lies, and how ours does: inverse of each other, bit for bit."""

    to_ours: Callable[[np.ndarray, Shape], np.ndarray]  # (theirs, shape of ours)
    to_theirs: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda x, shape: x, lambda x: x)
ROW = Layout(lambda x, shape: x.reshape(shape), lambda x: x[None])  # theirs [1, h]
QUERIES = Layout(lambda x, shape: x.reshape(shape), lambda x: x[None, None])  # theirs [1, 1, A, h]
LINEAR = Layout(lambda x, shape: x.T, lambda x: x.T)  # theirs [out, in]
CONV = Layout(lambda x, shape: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
QKV_KERNEL = Layout(  # theirs [3 h, h]: query, key and value, each [out, in]
    lambda x, shape: x.reshape(*shape[1:], shape[0]).transpose(3, 0, 1, 2),
    lambda x: x.transpose(1, 2, 3, 0).reshape(-1, x.shape[0]),
)
QKV_BIAS = Layout(lambda x, shape: x.reshape(shape), lambda x: x.reshape(-1))
OUT_KERNEL = Layout(  # theirs [out, heads · width of a head]
    lambda x, shape: x.T.reshape(shape), lambda x: x.reshape(-1, x.shape[-1]).T
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter of ours, and the tensor of theirs that holds it, or several end to end."""

    ours: str
    theirs: tuple[str, ...]
    layout: Layout = SAME

    @property
    def stacked(self) -> bool:
        """Is there one tensor for each block?"""
        return "{}" in self.theirs[0]

    def names(self, depth: int) -> list[tuple[str, ...]]:
        """Their names, block by block."""
        blocks = range(depth) if self.stacked else (None,)
        return [tuple(t.replace("{}", str(i)) for t in self.theirs) for i in blocks]


def entry(ours: str, *theirs: str, layout: Layout = SAME) -> Entry:
    """A row of a table."""
    return Entry(ours, theirs, layout)


@dataclasses.dataclass
class Report:
    """What became of every tensor of a file, and where every parameter came from."""

    path: str
    kind: str
    used: dict[str, str] = dataclasses.field(default_factory=dict)  # theirs -> ours
    unused: dict[str, str] = dataclasses.field(default_factory=dict)  # theirs -> why
    copied: dict[str, str] = dataclasses.field(default_factory=dict)  # ours -> ours it is from
    resized: dict[str, str] = dataclasses.field(default_factory=dict)  # ours -> from what to what
    new: dict[str, Shape] = dataclasses.field(default_factory=dict)  # ours, not in the file
    notes: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.kind}; {len(self.used)} tensors used, {len(self.unused)} unused, "
            f"{len(self.copied)} parameters copied within the model, {len(self.new)} new"
        ]
        lines += [f"  resized {name}: {how}" for name, how in sorted(self.resized.items())]
        lines += [f"  copied {name} from {source}" for name, source in sorted(self.copied.items())]
        lines += [f"  unused {name}: {why}" for name, why in sorted(self.unused.items())]
        lines += [f"  new {name} {list(shape)}" for name, shape in sorted(self.new.items())]
        return "\n".join(lines + [f"  {note}" for note in self.notes])


def shape_of(tensors: TensorFile, name: str, rank: int, what: str) -> Shape:
    """The shape of a tensor that tells sizes of the model; an error where it cannot."""
    if name not in tensors:
        raise UserError(f"{tensors.path}: tensor {name} is missing, so this is no whole {what}")
    shape = tensors[name].shape
    if len(shape) != rank or 0 in shape:
        raise UserError(
            f"{tensors[name].file}: tensor {name} is {list(shape)}, it should have {rank} "
            "dimensions and be not empty"
        )
    return shape


def read_table(
    table: Sequence[Entry],
    tensors: TensorFile,
    shapes: Mapping[str, Shape],
    unused: Sequence[tuple[str, str]],
    report: Report,
    *,
    optional: str = "(?!)",
    resize: Mapping[str, Callable[[np.ndarray, Shape], np.ndarray]] | None = None,
) -> dict[str, np.ndarray]:
    """The parameters that `table` names, in the shapes the model wants; all else is an error.

    Every tensor must be in the table, or fit a `(pattern, reason)` of `unused`. A parameter whose
    name fits `optional` may be absent. `resize` names the parameters whose shape may differ.
    """
    resize = resize or {}
    wanted = [e for e in table if e.ours in shapes]
    rows = {e.ours: e.names(shapes[e.ours][0] if e.stacked else 1) for e in wanted}
    known = {name for names in rows.values() for parts in names for name in parts}
    may_miss = {e.ours for e in wanted if re.search(optional, e.ours)}
    missing = sorted(
        name
        for ours, names in rows.items()
        if ours not in may_miss
        for parts in names
        for name in parts
        if name not in tensors
    )
    extra = []
    for name in sorted(set(tensors) - known):
        why = next((why for pattern, why in unused if re.fullmatch(pattern, name)), None)
        if why is None:
            extra.append(name)
        else:
            report.unused[name] = why
    if missing or extra:
        raise UserError(
            f"{tensors.path}: it does not hold a {report.kind} of this size: missing "
            f"{_some(missing)}; not known {_some(extra)}; check that the file and config.model "
            "name the same model"
        )
    params = {}
    for e in wanted:
        if e.ours in may_miss and rows[e.ours][0][0] not in tensors:
            continue
        params[e.ours] = _read_entry(e, rows[e.ours], tensors, shapes[e.ours], resize, report)
        report.used |= {name: e.ours for parts in rows[e.ours] for name in parts}
    return params


def _read_entry(e: Entry, names, tensors: TensorFile, shape: Shape, resize, report: Report):
    one = shape[1:] if e.stacked else shape
    whole = jax.eval_shape(e.layout.to_theirs, jax.ShapeDtypeStruct(one, np.float32)).shape
    count = len(e.theirs)
    part = whole if count == 1 else (whole[0] // count, *whole[1:])
    out = np.empty(shape, np.float32)
    for i, parts in enumerate(names):
        for name in parts:
            there = tensors[name].shape
            if there != part and e.ours not in resize:
                raise UserError(
                    f"{tensors[name].file}: tensor {name} is {list(there)}, the model's {e.ours} "
                    f"needs {list(part)}; the file holds another size of model than config.model"
                )
        x = [tensors.take(name) for name in parts]
        x = x[0] if count == 1 else np.concatenate(x)
        if x.shape != whole:
            report.resized[e.ours] = f"{list(x.shape)} to {list(whole)}"
            try:
                x = resize[e.ours](x, whole)
            except UserError as error:
                raise UserError(f"{tensors[parts[0]].file}: tensor {parts[0]}: {error}") from None
        if not np.isfinite(x).all():
            raise UserError(
                f"{tensors[parts[0]].file}: tensor {parts[0]} is not finite; do not use it"
            )
        if e.stacked:
            out[i] = e.layout.to_ours(x, one)
        else:
            out[...] = e.layout.to_ours(x, one)
    return out


def write_table(table: Sequence[Entry], params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors under their names, of the parameters that `table` and `params` both name."""
    tensors = {}
    for e in table:
        if e.ours not in params:
            continue
        x = params[e.ours]
        for i, names in enumerate(e.names(x.shape[0] if e.stacked else 1)):
            whole = np.asarray(e.layout.to_theirs(x[i] if e.stacked else x), order="C")
            size = whole.shape[0] // len(names) if whole.ndim else 0
            for j, name in enumerate(names):
                tensors[name] = whole if len(names) == 1 else whole[j * size : (j + 1) * size]
    return tensors


def _some(names: Sequence[str]) -> str:
    if not names:
        return "nothing"
    rest = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + rest
