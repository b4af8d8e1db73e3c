"""Cost of a program: FLOPs and bytes from its trace, collectives from its compiled text."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_DTYPE_BYTES = {"pred": 1, "s4": 1, "u4": 1, "bf16": 2, "f16": 2, "c64": 8}
_SHAPE = re.compile(r"\b(pred|bf16|c64|c128|f8\w*|[sfu]\d+)\[([\d,]*)\]")


# Work is counted in the traced program, because the compiler counts a loop body only once.


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs and bytes of the matrix products and convolutions, summed over all devices."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> "Work":
        return Work(self.flops * times, self.bytes * times)


def jaxpr_work(jaxpr: Any) -> Work:
    """Count a jaxpr's FLOPs and bytes, multiplying loop bodies by their trip counts."""
    total = Work()
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name in ("dot_general", "conv_general_dilated"):
            total += _product_work(eqn)
            continue
        inner = [jaxpr_work(sub) for sub in _inner(params)]
        if not inner:
            continue
        if name == "cond":  # count the most expensive branch
            total += max(inner, key=lambda work: work.flops)
            continue
        times = params.get("length", 1) if name == "scan" else 1
        if name == "shard_map":  # the body is written for one device
            times = params["mesh"].size
        total += sum(inner, Work()) * times
    return total


def _inner(params: Mapping[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            one = getattr(one, "jaxpr", one)
            if hasattr(one, "eqns"):
                yield one


def _product_work(eqn: Any) -> Work:
    left, right = (v.aval for v in eqn.invars[:2])
    out = eqn.outvars[0].aval
    moved = sum(math.prod(a.shape) * a.dtype.itemsize for a in (left, right, out))
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        depth = math.prod(left.shape[i] for i in contracted)
    else:
        numbers = eqn.params["dimension_numbers"]
        depth = math.prod(right.shape) / right.shape[numbers.rhs_spec[0]]
        depth /= math.prod(eqn.params["lhs_dilation"])
    return Work(2.0 * math.prod(out.shape) * depth, float(moved))


# Collectives are found in the compiled text.


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a compiled program."""

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # of the results: (dtype, shape)
    times: int  # executions per step
    source: str  # name of the JAX operation that it comes from

    @property
    def bytes(self) -> int:
        """Size of the results, summed over all executions of a step."""
        return self.times * sum(
            _dtype_bytes(dtype) * math.prod(shape) for dtype, shape in self.shapes
        )


def collectives(text: str) -> Iterator[Collective]:
    """Yield each collective of a compiled program once, with its number of executions per step.

    Asynchronous collectives appear several times in the text, under one channel. Different
    collectives of a `shard_map` can share a channel too.
    """
    bodies = dict(_computations(text))
    times = _times(bodies)
    seen: set[tuple[object, ...]] = set()
    for name, lines in bodies.items():
        for line in lines:
            found = re.search(rf" = (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(", line)
            if not found or not times.get(name, 0):
                continue
            shapes = [
                (dtype, tuple(int(n) for n in dims.split(",") if n))
                for dtype, dims in _SHAPE.findall(found[1])
            ]
            if found[3] and found[2] != "all-reduce":  # (operands, results, …)
                shapes = [s for s in shapes if s[0] != "u32" or len(shapes) <= 2]
                shapes = shapes[len(shapes) // 2 :]
            channel = re.search(r"channel_id=(\d+)", line)
            source = re.search(r'op_name="([^"]*)"', line)
            identity = (found[2], *shapes, channel[1], source and source[1]) if channel else (line,)
            if identity in seen:
                continue
            seen.add(identity)
            yield Collective(found[2], tuple(shapes), times[name], source[1] if source else "")


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    name, lines = None, []
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if head and not line.startswith(" "):
            name, lines = ("ENTRY" if head[1] else head[2]), []
        elif line.startswith("}") and name:
            yield name, lines
            name = None
        elif name:
            lines.append(line)


def _times(bodies: Mapping[str, list[str]]) -> dict[str, int]:
    """Return how often each computation runs in a step."""
    times: dict[str, int] = collections.defaultdict(int)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for line in bodies.get(name, ()):
            trips = _trips(line, bodies)
            for called in re.findall(
                r"(?:calls|to_apply|true_computation|false_computation|body)=%?([\w.\-]+)", line
            ) + re.findall(r"%([\w.\-]+)", _branches(line)):
                visit(called, count * trips)

    visit("ENTRY", 1)
    return dict(times)


def _trips(line: str, bodies: Mapping[str, list[str]]) -> int:
    """Return the trip count of the loop in a line; 1 if unknown or if there is no loop."""
    if " while(" not in line:
        return 1
    if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', line):
        return int(known[1])
    # A TPU's text lacks the trip count, but a scan's condition compares the counter to a constant.
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    lines = bodies.get(condition[1], ()) if condition else ()
    limits = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(lines))
    return int(limits[0]) if len(limits) == 1 else 1


def _branches(line: str) -> str:
    found = re.search(r"(?:branch_computations|called_computations)=\{([^}]*)\}", line)
    return found[1] if found else ""


def _dtype_bytes(dtype: str) -> int:
    if dtype in _DTYPE_BYTES:
        return _DTYPE_BYTES[dtype]
    bits = int("".join(re.findall(r"\d+", dtype)[:1]))
    return max(bits // 8, 1)
