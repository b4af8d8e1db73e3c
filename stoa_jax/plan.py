"""What a run will need, before it is paid for: the real train step, compiled for a topology.

`--mode=plan --topology=v5e:16x16` needs no TPU, only libtpu (the `tpu` extra). For `gpu:8` there
is no compiler without a GPU: the step is compiled for as many CPU devices, which gives the same
partitioning and collectives, and memory is an estimate that says so.
"""

import collections
import dataclasses
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.experimental import topologies
from ml_collections import ConfigDict

from stoa_jax.errors import UserError
from stoa_jax.models.stoa import Stoa
from stoa_jax.monitor import duration
from stoa_jax.program import make_program
from stoa_jax.workdir import check_config

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one chip."""

    name: str
    flops: float  # bf16, a second
    memory: float  # bytes
    bandwidth: float  # of memory, bytes a second
    links: float  # of all links to other chips, both ways, bytes a second
    per_host: int


# cloud.google.com/tpu/docs/{v5e,v5p,v6e}; NVIDIA's data sheets (dense, SXM).
CHIPS = {
    "v5e": Chip("TPU v5e", 197e12, 16 * GIB, 819e9, 200e9, 4),
    "v5p": Chip("TPU v5p", 459e12, 95 * GIB, 2765e9, 600e9, 4),
    "v6e": Chip("TPU v6e", 918e12, 32 * GIB, 1640e9, 448e9, 4),
    "a100": Chip("NVIDIA A100 80 GB", 312e12, 80 * GIB, 2039e9, 600e9, 8),
    "h100": Chip("NVIDIA H100", 989e12, 80 * GIB, 3350e9, 900e9, 8),
    "h200": Chip("NVIDIA H200", 989e12, 141e9, 4800e9, 900e9, 8),
    "cpu": Chip("virtual CPU device", math.nan, math.nan, math.nan, math.nan, 8),
}
USABLE = 0.95  # of the memory; the run-time keeps the rest
UTILISATION = 0.4  # what a well tuned model of this width reaches of the published peak

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# How often a byte of the result crosses a chip's links, on a ring of many.
CROSSINGS = {"all-reduce": 2.0}
_DTYPE_BYTES = {"pred": 1, "s4": 1, "u4": 1, "bf16": 2, "f16": 2, "c64": 8}
_SHAPE = re.compile(r"\b(pred|bf16|c64|c128|f8\w*|[sfu]\d+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Topology:
    """So many chips of a kind."""

    text: str
    chip: Chip
    count: int
    tpu: bool
    compiled: bool  # by the chip's own compiler

    @property
    def hosts(self) -> int:
        """Machines that hold them."""
        return max(self.count // self.chip.per_host, 1)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the compiled step."""

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # of the results: (dtype, shape)
    times: int  # a step
    source: str  # the operation that it stems from

    @property
    def bytes(self) -> int:
        """Of the results, over all times."""
        return self.times * sum(
            _dtype_bytes(dtype) * math.prod(shape) for dtype, shape in self.shapes
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one chip has to do and to hold in a step."""

    topology: Topology
    mesh: dict[str, int]
    clips: int  # in a step, globally
    steps: int
    state_bytes: float
    memory_bytes: float
    flops: float
    traffic: float  # bytes of memory
    collectives: tuple[Collective, ...] | None  # None: the compiler gives no text
    compile_seconds: float
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Does it?"""
        return not self.memory_bytes > USABLE * self.topology.chip.memory

    def seconds(self) -> dict[str, float]:
        """The least time of a step by each of the three limits."""
        chip = self.topology.chip
        links = sum(CROSSINGS.get(c.kind, 1.0) * c.bytes for c in self.collectives or ())
        return {
            "compute": self.flops / chip.flops,
            "memory": self.traffic / chip.bandwidth,
            "links": links / (chip.links / 2),  # one way
        }


def parse_topology(text: str) -> Topology:
    """`v5e:16x16`, `gpu:8` (an H100), `h200:8`, `cpu:8`."""
    kind, _, shape = text.partition(":")
    kind = "h100" if kind == "gpu" else kind
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise UserError(
            f"--topology: {text!r} is not known; write KIND:SHAPE, for example v5e:16x16, "
            f"v5p:4x4x8, gpu:8 (kinds: gpu, {', '.join(CHIPS)})"
        )
    count = math.prod(int(n) for n in shape.split("x"))
    tpu = kind.startswith("v")
    return Topology(text, CHIPS[kind], count, tpu, tpu or kind == "cpu")


def devices_of(topology: Topology) -> Sequence[Any]:
    """The topology's devices, or as many of the CPU's as stand in for them."""
    if not topology.tpu:
        devices = jax.devices("cpu")
        if len(devices) < topology.count:
            raise UserError(
                f"--topology={topology.text} needs {topology.count} CPU devices, there are "
                f"{len(devices)}; set XLA_FLAGS="
                f"--xla_force_host_platform_device_count={topology.count}"
            )
        return devices[: topology.count]
    # Without these libtpu asks a metadata server that is not there, and refuses to load twice.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        found = topologies.get_topology_desc(topology.text, platform="tpu")
    except Exception as error:
        line = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"--topology={topology.text}: libtpu cannot describe it ({line}); install it with "
            "pip install 'stoa-jax[tpu]', and see that the shape exists"
        ) from error
    return found.devices


def prepare(topology: str) -> None:
    """The environment that planning needs; only before JAX has looked at its devices."""
    parsed = parse_topology(topology)
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    if not parsed.tpu:
        flag = f"--xla_force_host_platform_device_count={parsed.count}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


def abstract_batch(task: Any, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a global batch of what the task wants."""
    spec = task.batch_spec(train=True)
    t, k, s = spec.frames, spec.objects, spec.image_size
    text = (5, spec.text_length) if spec.kind == "multiple_choice" else (spec.text_length,)
    shapes = {
        "pixels": ((t, s, s, 3), jnp.uint8),
        "boxes": ((t, k, 4), jnp.float32),
        "classes": ((t, k), jnp.int32),
        "scores": ((t, k), jnp.float32),
        "tokens": (text, jnp.int32),
        "tags": (text, jnp.int8),
        "valid": ((), jnp.bool_),
        "index": ((), jnp.int32),
    }
    if spec.kind != "caption":
        shapes["answer"] = ((), jnp.int32)
    return {
        name: jax.ShapeDtypeStruct((size, *shape), dtype) for name, (shape, dtype) in shapes.items()
    }


def make_plan(
    c: ConfigDict,
    task: Any,
    topology: Topology,
    batch: Mapping[str, jax.ShapeDtypeStruct] | None = None,
    build_model: Any = Stoa,
) -> Plan:
    """Lower and compile the real step of this configuration for these chips."""
    steps, notes = run_steps(c)
    program = make_program(c, task, steps, build_model, devices_of(topology))
    batch = abstract_batch(task, c.train.batch_size) if batch is None else batch
    began = time.monotonic()
    with jax.set_mesh(program.mesh):
        traced = program.step.trace(program.state, batch)
        compiled = traced.lower().compile()
        if not topology.compiled:
            # The GPU's own compiler is not there; that the step lowers for it can be seen.
            traced.lower(lowering_platforms=("cuda",))
    seconds = time.monotonic() - began
    work = jaxpr_work(traced.jaxpr.jaxpr)
    state_bytes = sum(
        math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, where in zip(
            jax.tree.leaves(program.state), jax.tree.leaves(program.shardings), strict=True
        )
    )
    stats = compiled.memory_analysis()
    memory = (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes
    )
    if not topology.compiled:
        notes.append("memory is the CPU compiler's figure, an estimate: no GPU compiler is here")
    try:
        found = tuple(collectives(compiled.as_text()))
    except Exception as error:
        found = None
        notes.append(f"collectives unknown: the compiler gives no text ({type(error).__name__})")
    return Plan(
        topology=topology,
        mesh=dict(program.mesh.shape),
        clips=c.train.batch_size,
        steps=steps,
        state_bytes=state_bytes,
        memory_bytes=memory,
        flops=work.flops / topology.count,
        # Operands and results of the matrix products, and what the optimizer reads and writes.
        traffic=work.bytes / topology.count + 2 * state_bytes,
        collectives=found,
        compile_seconds=seconds,
        notes=tuple(notes),
    )


def run_steps(c: ConfigDict) -> tuple[int, list[str]]:
    """How long the run is; with epochs, the built set says it, or its published size."""
    if c.train.epochs <= 0:
        return c.train.steps, []
    published = {"webvid/captions": 2_490_000, "msrvtt/captioning": 6_513}
    folder = c.data.dir or os.environ.get("STOA_DATA", "data")
    clips, notes = 0, []
    for name, _ in c.data.sets:
        try:
            from stoa_jax.data import pipeline

            clips += len(pipeline.open_split(folder, name, c.data.train_split))
        except (UserError, OSError):
            if name not in published:
                notes.append(f"{name} is not built here: the hours are of train.steps")
                return c.train.steps, notes
            clips += published[name]
            notes.append(f"{name} is not built here: taken to be {published[name]:,} clips")
    return max(round(c.train.epochs * clips / c.train.batch_size), 1), notes


# Work, from the traced program: the compiler's own count ignores how often a loop runs.


@dataclasses.dataclass(frozen=True)
class Work:
    """Of the matrix products and convolutions, over all devices."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> "Work":
        return Work(self.flops * times, self.bytes * times)


def jaxpr_work(jaxpr: Any) -> Work:
    """Of a jaxpr, with every loop body as often as it runs."""
    total = Work()
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name in ("dot_general", "conv_general_dilated"):
            total += _product_work(eqn)
            continue
        inner = [jaxpr_work(sub) for sub in _inner(params)]
        if not inner:
            continue
        if name == "cond":  # the dearest branch
            total += max(inner, key=lambda work: work.flops)
            continue
        times = params.get("length", 1) if name == "scan" else 1
        if name == "shard_map":  # written for one device
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


# Collectives, from the compiled text.


def collectives(text: str) -> Iterator[Collective]:
    """Each once, though asynchronous ones appear several times; times of loops included."""
    bodies = dict(_computations(text))
    times = _times(bodies)
    seen: set[str] = set()
    for name, lines in bodies.items():
        for line in lines:
            found = re.search(rf" = (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(", line)
            if not found or not times.get(name, 0):
                continue
            channel = re.search(r"channel_id=(\d+)", line)
            identity = channel[1] if channel else line
            if identity in seen:
                continue
            seen.add(identity)
            shapes = [
                (dtype, tuple(int(n) for n in dims.split(",") if n))
                for dtype, dims in _SHAPE.findall(found[1])
            ]
            if found[3] and found[2] != "all-reduce":  # (operands, results, …)
                shapes = [s for s in shapes if s[0] != "u32" or len(shapes) <= 2]
                shapes = shapes[len(shapes) // 2 :]
            source = re.search(r'op_name="([^"]*)"', line)
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
    """How often each computation runs in a step."""
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
    """How often the loop of a line runs; 1 where that is not known, or it is no loop."""
    if " while(" not in line:
        return 1
    if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', line):
        return int(known[1])
    # The TPU's text does not say; a scan's condition compares its counter with one constant.
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    limits = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(bodies.get(condition[1], ())))
    return int(limits[0]) if len(limits) == 1 else 1


def _branches(line: str) -> str:
    found = re.search(r"(?:branch_computations|called_computations)=\{([^}]*)\}", line)
    return found[1] if found else ""


def _dtype_bytes(dtype: str) -> int:
    if dtype in _DTYPE_BYTES:
        return _DTYPE_BYTES[dtype]
    return max(int(re.search(r"\d+", dtype)[0]) // 8, 1)


# Words.


def report(c: ConfigDict, topology: str) -> str:
    """What `--mode=plan` prints."""
    from stoa_jax.tasks import make_task

    check_config(c)
    parsed = parse_topology(topology)
    plan = make_plan(c, make_task(c), parsed)
    text = describe(plan)
    if plan.fits:
        return text + "\nIt fits."
    lines = [text, "\nIt does not fit. What would:"]
    for what, changed in alternatives(c, parsed):
        logging.info("compiling with %s", what)
        try:
            other = make_plan(changed, make_task(changed), parsed)
        except UserError as error:
            lines.append(f"  {what}: not possible, {error}")
            continue
        verdict = "fits" if other.fits else "does not fit"
        lines.append(
            f"  {what}: {other.memory_bytes / GIB:.1f} GiB a chip, {verdict}{_step_words(other)}"
        )
    return "\n".join(lines)


def alternatives(c: ConfigDict, topology: Topology) -> Iterator[tuple[str, ConfigDict]]:
    """Remat, accumulation, FSDP, each on its own, then all."""

    def changed(**settings: Any) -> ConfigDict:
        other = ConfigDict(c.to_dict())
        for key, value in settings.items():
            section, _, name = key.partition("__")
            other[section][name] = value
        return other.lock()

    if c.model.remat != "full":
        yield "model.remat=full", changed(model__remat="full")
    per_chip = c.train.batch_size // topology.count
    parts = next((n for n in (4, 2) if per_chip % n == 0 and c.train.accumulate == 1), 1)
    if parts > 1:
        yield f"train.accumulate={parts}", changed(train__accumulate=parts)
    if c.mesh.fsdp == 1 and topology.count > 1:
        split = dict(mesh__data=1, mesh__fsdp=-1)
        yield "mesh.data=1 mesh.fsdp=-1", changed(**split)
        if c.model.remat != "full":
            yield (
                "model.remat=full mesh.data=1 mesh.fsdp=-1",
                changed(model__remat="full", **split),
            )


def describe(plan: Plan) -> str:
    """The figures, a line each."""
    chip, count = plan.topology.chip, plan.topology.count
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    lines = [
        f"{plan.topology.text}: {count} × {chip.name}, {plan.topology.hosts} host(s); mesh {mesh}; "
        f"compiled in {plan.compile_seconds:.0f} s",
        "",
        "per chip",
        f"  memory     {plan.memory_bytes / GIB:8.2f} GiB of {chip.memory / GIB:.0f} "
        f"(parameters and optimizer {plan.state_bytes / GIB:.2f})",
        f"  work       {plan.flops / 1e12:8.2f} TFLOP a step "
        f"({plan.flops * count / plan.clips / 1e12:.2f} a clip)",
    ]
    if plan.collectives is None:
        lines.append("  collectives  not known")
    else:
        lines += _collective_lines(plan.collectives)
    if math.isfinite(chip.flops):
        seconds = plan.seconds()
        limit = max(seconds, key=seconds.get)
        step = seconds[limit]
        tuned = max(seconds["compute"] / UTILISATION, step)
        lines += [
            "",
            "a step, at the published peaks",
            *(f"  {name:10} {value * 1e3:8.1f} ms" for name, value in seconds.items()),
            f"  roofline   {step * 1e3:8.1f} ms, limited by {limit}",
            "",
            f"{'':23}{'roofline':>12}{f'at {UTILISATION:.0%} of peak':>18}",
        ]
        for name, figure in (
            ("clips a second", lambda s: f"{plan.clips / s:,.0f}"),
            ("clips a second, host", lambda s: f"{plan.clips / s / plan.topology.hosts:,.0f}"),
            (f"{plan.steps:,} steps", lambda s: duration(plan.steps * s)),
        ):
            lines.append(f"  {name:21}{figure(step):>12}{figure(tuned):>18}")
        lines.append("  (each host's loader must bring its clips a second)")
    lines += [f"note: {note}" for note in plan.notes]
    return "\n".join(lines)


def _collective_lines(found: Sequence[Collective]) -> list[str]:
    kinds: dict[str, list[Collective]] = collections.defaultdict(list)
    for collective in found:
        kinds[collective.kind].append(collective)
    lines = [
        f"  {kind:18} {sum(c.times for c in of_kind):4} a step, "
        f"{sum(c.bytes for c in of_kind) / 2**20:10,.2f} MiB"
        for kind, of_kind in sorted(kinds.items())
    ]
    return lines or ["  no collectives"]


def _step_words(plan: Plan) -> str:
    if not math.isfinite(plan.topology.chip.flops):
        return ""
    return f", roofline {max(plan.seconds().values()) * 1e3:.0f} ms a step"
