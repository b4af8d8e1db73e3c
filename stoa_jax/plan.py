"""Predict memory, work and time of a run by compiling its real train step for a topology.

`--mode=plan --topology=v5e:16x16` needs libtpu (the `tpu` extra) but no TPU. XLA cannot compile for
a GPU without one, so for `gpu:8` the step is compiled for eight CPU devices. Partitioning and
collectives are then the same; the memory is marked as an estimate.
"""

import collections
import dataclasses
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.experimental import topologies
from ml_collections import ConfigDict

from stoa_jax.chips import CHIPS, GIB, Chip
from stoa_jax.config import data_folder
from stoa_jax.cost import Collective, collectives, jaxpr_work
from stoa_jax.errors import UserError
from stoa_jax.models.stoa import Stoa
from stoa_jax.monitor import duration
from stoa_jax.program import make_program
from stoa_jax.workdir import check_config

if TYPE_CHECKING:
    from stoa_jax.tasks import Task

USABLE = 0.95  # share of the memory that a program can use; the runtime keeps the rest
# Code that is compiled for CPU devices as a substitute never runs, so it is not optimised.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
UTILISATION = 0.4  # share of the published peak that a well-tuned model of this width reaches
# How often each byte of the result crosses a chip's links, on a ring of many chips; else once.
CROSSINGS = {"all-reduce": 2.0}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A number of chips of one kind, to plan for."""

    text: str
    chip: Chip
    count: int
    tpu: bool
    compiled: bool  # whether the chip's own compiler is used

    @property
    def hosts(self) -> int:
        """Number of machines that hold the chips."""
        return max(self.count // self.chip.per_host, 1)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Memory, work and communication of one chip in one training step."""

    topology: Topology
    mesh: dict[str, int]
    clips: int  # per step, over all chips
    steps: int
    state_bytes: float
    memory_bytes: float
    flops: float
    traffic: float  # bytes read from and written to memory
    collectives: tuple[Collective, ...] | None  # None if the compiler provides no text
    compile_seconds: float
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the step fits into a chip's usable memory."""
        return not self.memory_bytes > USABLE * self.topology.chip.memory

    def seconds(self) -> dict[str, float]:
        """Return the shortest possible time of a step under each of the three limits."""
        chip = self.topology.chip
        links = sum(CROSSINGS.get(c.kind, 1.0) * c.bytes for c in self.collectives or ())
        return {
            "compute": self.flops / chip.flops,
            "memory": self.traffic / chip.bandwidth,
            "links": links / (chip.links / 2),  # half of the bandwidth is one direction
        }


def parse_topology(text: str) -> Topology:
    """Parse a topology such as `v5e:16x16`, `gpu:8` (H100s), `h200:8` or `cpu:8`."""
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
    """Return the topology's devices, or the same number of CPU devices in place of GPUs."""
    if not topology.tpu:
        devices = jax.devices("cpu")
        if len(devices) < topology.count:
            raise UserError(
                f"--topology={topology.text} needs {topology.count} CPU devices, there are "
                f"{len(devices)}; set XLA_FLAGS="
                f"--xla_force_host_platform_device_count={topology.count}"
            )
        return devices[: topology.count]
    # Without these, libtpu queries a metadata server that does not exist, or refuses to load twice.
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-1"),
    ):
        os.environ.setdefault(name, value)
    try:
        found = topologies.get_topology_desc(topology.text, platform="tpu")
    except Exception as error:  # jax, XLA and libtpu have no common base class
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"--topology={topology.text}: libtpu cannot describe it ({line}); install it with "
            "pip install 'stoa-jax[tpu]', and check that the shape exists"
        ) from error
    return found.devices


def prepare(topology: str) -> None:
    """Set up JAX for planning; call it before JAX has initialised its devices."""
    parsed = parse_topology(topology)
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    if not parsed.tpu:
        flag = f"--xla_force_host_platform_device_count={parsed.count}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


def abstract_batch(task: "Task", size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes and types of a task's global training batch of `size` clips."""
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
    task: "Task",
    topology: Topology,
    batch: Mapping[str, jax.ShapeDtypeStruct] | None = None,
    build_model: Callable[..., Stoa] = Stoa,
) -> Plan:
    """Lower and compile the real train step of a configuration for a topology."""
    steps, notes = run_steps(c)
    program = make_program(c, task, steps, build_model, devices_of(topology))
    batch = abstract_batch(task, c.train.batch_size) if batch is None else batch
    began = time.monotonic()
    with jax.set_mesh(program.mesh):
        traced = program.step.trace(program.state, batch)
        lowered = traced.lower()
        if not topology.compiled:
            # Compiling needs a GPU, but lowering does not: check at least that it succeeds.
            traced.lower(lowering_platforms=("cuda",))
            notes.append("memory is an estimate by the CPU compiler: compiling for GPUs needs one")
    state_bytes = sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(
            jax.tree.leaves(program.state), jax.tree.leaves(program.shardings), strict=True
        )
    )
    memory, exchanged = _compile(lowered, None if topology.tpu else QUICK, state_bytes, notes)
    seconds = time.monotonic() - began
    work = jaxpr_work(traced.jaxpr.jaxpr)
    return Plan(
        topology=topology,
        mesh=dict(program.mesh.shape),
        clips=c.train.batch_size,
        steps=steps,
        state_bytes=state_bytes,
        memory_bytes=memory,
        flops=work.flops / topology.count,
        # Operands and results of the matrix products, and the state that the optimizer updates.
        traffic=work.bytes / topology.count + 2 * state_bytes,
        collectives=exchanged,
        compile_seconds=seconds,
        notes=tuple(notes),
    )


def _compile(
    lowered: Any, options: dict[str, Any] | None, state_bytes: float, notes: list[str]
) -> tuple[float, tuple[Collective, ...] | None]:
    """Return a chip's memory and collectives; what cannot be determined is added to `notes`."""
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        needed = temporaries(str(error))
        if needed is None:
            raise
        # A TPU's compiler stops if a program does not fit, and reports only its temporaries.
        notes.append("it is too large for the compiler to finish: memory is at least this much")
        return needed + state_bytes, None
    stats = compiled.memory_analysis()
    memory = (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes
    )
    try:
        return memory, tuple(collectives(compiled.as_text()))
    except jax.errors.JaxRuntimeError as error:
        line = str(error).splitlines()[0][:120]
        notes.append(
            f"collectives are unknown, and links are not counted: no compiled text ({line}); "
            "use the libtpu of this jax (pip install 'stoa-jax[tpu]')"
        )
        return memory, None


def temporaries(message: str) -> float | None:
    """Return the bytes of temporaries in an out-of-memory error; None for any other error."""
    found = re.search(r"memory required for HLO temporaries \(([\d.]+)([KMGT])\)", message)
    return float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1) if found else None


def run_steps(c: ConfigDict) -> tuple[int, list[str]]:
    """Return the number of steps of a run, and notes on how it was determined.

    With `train.epochs` it follows from the size of the built data sets, or from their published
    size if they are not built.
    """
    if c.train.epochs <= 0:
        return c.train.steps, []
    from stoa_jax.data.sources import expected_clips

    folder = data_folder(c)
    clips, notes = 0, []
    for name, _ in c.data.sets:
        try:
            from stoa_jax.data import pipeline

            clips += len(pipeline.open_split(folder, name, c.data.train_split))
        except (UserError, OSError):
            expected = expected_clips(name, c.data.train_split)
            if not expected:
                notes.append(f"{name} is not built here: train.steps is used")
                return c.train.steps, notes
            clips += expected
            notes.append(f"{name} is not built here: assumed to have {expected:,} clips")
    return max(round(c.train.epochs * clips / c.train.batch_size), 1), notes


# The report


def report(c: ConfigDict, topology: str, task: "Task | None" = None, **parts: Any) -> str:
    """Return the text that `--mode=plan` prints, with alternatives if the run does not fit.

    `task` and the arguments `parts` of `make_plan` override those of the configuration.
    """
    from stoa_jax.tasks import make_task

    check_config(c)
    parsed = parse_topology(topology)
    plan = make_plan(c, task or make_task(c), parsed, **parts)
    text = describe(plan)
    if plan.fits:
        return text + "\nIt fits."
    lines = [text, "\nIt does not fit. Alternatives:"]
    for what, changed in alternatives(c, parsed):
        logging.info("compiling with %s", what)
        try:
            other = make_plan(changed, task or make_task(changed), parsed, **parts)
        except UserError as error:
            lines.append(f"  {what}: not possible, {error}")
            continue
        verdict = f"fits{_step_words(other)}" if other.fits else "does not fit"
        lines.append(f"  {what}: {other.memory_bytes / GIB:.1f} GiB per chip, {verdict}")
    return "\n".join(lines)


def alternatives(c: ConfigDict, topology: Topology) -> Iterator[tuple[str, ConfigDict]]:
    """Yield changed configurations that need less memory: remat, accumulation, FSDP, combined."""

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
    """Format a plan as a table."""
    chip, count = plan.topology.chip, plan.topology.count
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    lines = [
        f"{plan.topology.text}: {count} × {chip.name}, {plan.topology.hosts} host(s); mesh {mesh}; "
        f"compiled in {plan.compile_seconds:.0f} s",
        "",
        "per chip",
        f"  memory     {plan.memory_bytes / GIB:8.2f} GiB of {chip.memory / GIB:.0f} "
        f"(parameters and optimizer {plan.state_bytes / GIB:.2f})",
        f"  work       {plan.flops / 1e12:8.2f} TFLOP per step "
        f"({plan.flops * count / plan.clips / 1e12:.2f} per clip)",
    ]
    if plan.collectives is None:
        lines.append("  collectives  unknown")
    else:
        lines += _collective_lines(plan.collectives)
    if math.isfinite(chip.flops):
        seconds = plan.seconds()
        limit = max(seconds, key=lambda name: seconds[name])
        step = seconds[limit]
        tuned = max(seconds["compute"] / UTILISATION, step)
        lines += [
            "",
            "time per step, at the published peaks",
            *(f"  {name:10} {value * 1e3:8.1f} ms" for name, value in seconds.items()),
            f"  roofline   {step * 1e3:8.1f} ms, limited by {limit}",
            "",
            f"{'':23}{'roofline':>12}{f'at {UTILISATION:.0%} of peak':>18}",
        ]
        for name, metric in (
            ("clips/s", lambda s: f"{plan.clips / s:,.0f}"),
            ("clips/s per host", lambda s: f"{plan.clips / s / plan.topology.hosts:,.0f}"),
            (f"{plan.steps:,} steps", lambda s: duration(plan.steps * s)),
        ):
            lines.append(f"  {name:21}{metric(step):>12}{metric(tuned):>18}")
        lines.append("  (the loader of each host must reach the clips/s per host)")
    lines += [f"note: {note}" for note in plan.notes]
    return "\n".join(lines)


def _collective_lines(found: Sequence[Collective]) -> list[str]:
    kinds: dict[str, list[Collective]] = collections.defaultdict(list)
    for collective in found:
        kinds[collective.kind].append(collective)
    lines = [
        f"  {kind:18} {sum(c.times for c in of_kind):4} per step, "
        f"{sum(c.bytes for c in of_kind) / 2**20:10,.2f} MiB"
        for kind, of_kind in sorted(kinds.items())
    ]
    return lines or ["  no collectives"]


def _step_words(plan: Plan) -> str:
    if not math.isfinite(plan.topology.chip.flops):
        return ""
    return f", roofline {max(plan.seconds().values()) * 1e3:.0f} ms per step"
