"""Conversion tables between our parameters and other projects' tensors, used in both directions.

A row is (our name, their names, layout). A name of theirs with `{}` stands for one tensor per
block; our parameters stack the blocks on a leading depth axis.
"""

import concurrent.futures
import dataclasses
import re
import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from stoa_jax.errors import UserError
from stoa_jax.weights.tensors import TensorFile

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """A pair of functions between their memory layout and ours, exact inverses of each other."""

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
    """A table row: a parameter of ours, and the tensor or concatenated tensors that hold it."""

    ours: str
    theirs: tuple[str, ...]
    layout: Layout = SAME

    @property
    def stacked(self) -> bool:
        """Whether there is one tensor per block."""
        return "{}" in self.theirs[0]

    def names(self, depth: int) -> list[tuple[str, ...]]:
        """Return their names for each block."""
        blocks = range(depth) if self.stacked else (None,)
        return [tuple(t.replace("{}", str(i)) for t in self.theirs) for i in blocks]


def entry(ours: str, *theirs: str, layout: Layout = SAME) -> Entry:
    """Build a table row."""
    return Entry(ours, theirs, layout)


@dataclasses.dataclass
class Report:
    """Account of a loaded file: the use of every tensor, and the source of every parameter."""

    path: str
    kind: str
    used: dict[str, str] = dataclasses.field(default_factory=dict)  # theirs -> ours
    unused: dict[str, str] = dataclasses.field(default_factory=dict)  # theirs -> reason
    copied: dict[str, str] = dataclasses.field(default_factory=dict)  # ours -> our source
    resized: dict[str, str] = dataclasses.field(default_factory=dict)  # ours -> old and new shape
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
    """Return the shape of a tensor from which model sizes are read; raise UserError if unusable."""
    if name not in tensors:
        raise UserError(f"{tensors.path}: tensor {name} is missing; this is not a complete {what}")
    shape = tensors[name].shape
    if len(shape) != rank or 0 in shape:
        raise UserError(
            f"{tensors[name].file}: tensor {name} is {list(shape)}; it must have {rank} "
            "dimensions and must not be empty"
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
    """Read the parameters in `table`, in the model's `shapes`, and record them in `report`.

    Every tensor of the file must be in the table or match a `(pattern, reason)` of `unused`.
    Every parameter of the table must be in the file, except those that match `optional`. `resize`
    maps the parameters whose shape may differ to the function that resizes them.
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
            f"{tensors.path}: not a {report.kind} of this size: missing {_some(missing)}; "
            f"unexpected {_some(extra)}; check that the file and config.model describe the same "
            "model"
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
    whole = e.layout.to_theirs(np.empty(one, np.float32)).shape
    count = len(e.theirs)
    part = whole if count == 1 else (whole[0] // count, *whole[1:])
    out = np.empty(shape, np.float32)
    reading = threading.Lock()  # a torch file has one position

    def fill(i: int) -> None:
        parts = names[i]
        for name in parts:
            found = tensors[name].shape
            if found != part and e.ours not in resize:
                raise UserError(
                    f"{tensors[name].file}: tensor {name} is {list(found)}, the model's {e.ours} "
                    f"needs {list(part)}; the file holds a model of another size than config.model"
                )
        with reading:
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
                f"{tensors[parts[0]].file}: tensor {parts[0]} holds values that are not finite; "
                "use another file"
            )
        if e.stacked:
            out[i] = e.layout.to_ours(x, one)
        else:
            out[...] = e.layout.to_ours(x, one)

    # Threads, because transposing takes longer than reading, and NumPy releases the interpreter.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(fill, range(len(names))))  # raises the first error
    return out


def write_table(table: Sequence[Entry], params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Convert parameters to tensors in their names and layout, for rows that `params` fills."""
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
