"""Wrap our step and the twin's, so that they can be timed in turn."""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from benchmarks import setting
from benchmarks.results import Results
from stoa_jax.cost import Work, jaxpr_work
from stoa_jax.models import layers
from stoa_jax.models.config import ModelConfig


@dataclasses.dataclass
class Side:
    """A step that is timed: each call takes one step and waits for it."""

    name: str
    step: Callable[[], float]  # returns the loss
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def median(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.seconds)


def in_turn(
    sides: list[Side], rounds: int, steps: int, until: float = float("inf")
) -> Iterator[None]:
    """Time `steps` steps of every side in each round; yield after each round.

    Stops before a round that would end after the time `until` of `time.monotonic()`.
    """
    for _ in range(rounds):
        began = time.monotonic()
        for side in sides:
            for _ in range(steps):
                start = time.perf_counter()
                side.step()
                side.seconds.append(time.perf_counter() - start)
        yield
        if 2 * time.monotonic() - began > until:
            return


class OurStep:
    """Our compiled training step with its state and a batch on a device."""

    def __init__(
        self,
        c: ModelConfig,
        config: Any,
        device: jax.Device,
        params: Callable[[], Mapping[str, np.ndarray]],
        batch: Mapping[str, np.ndarray],
    ):
        self.program, _ = setting.our_program(c, config, device)
        self._params = params
        self._batch = {k: jax.device_put(v, device) for k, v in batch.items()}
        self.state, self.compiled, self.compile_seconds = None, None, 0.0

    def compile(self, options: dict[str, Any] | None = None) -> "OurStep":
        """Compile the step; allocates nothing, so that several can compile in threads."""
        began = time.monotonic()
        lowered = self.program.step.lower(self.program.state, self._batch)
        self.compiled = lowered.compile(compiler_options=options)
        self.compile_seconds = time.monotonic() - began
        return self

    def temporaries(self) -> int:
        """Return the bytes of temporaries of the compiled step."""
        return self.compiled.memory_analysis().temp_size_in_bytes

    def __call__(self) -> float:
        """Take one step and return its loss."""
        if self.state is None:
            self.state = self.program.start(self._params())
        self.state, values = self.compiled(self.state, self._batch)
        return setting.metrics_by_name(self.program, values)["loss"]

    def release(self) -> None:
        """Free the state; the next call starts again."""
        self.state = None


def twin_side(
    name: str,
    c: ModelConfig,
    config: Any,
    params: Mapping[str, np.ndarray],
    batch: Mapping[str, np.ndarray],
    **options: Any,
) -> Side:
    """Return the twin with our parameters as a side; `options` are those of `TwinStep`."""
    from benchmarks.twin.step import TwinStep

    twin = TwinStep(c, params, config, **options)
    on_device = twin.batch(batch)

    def step() -> float:
        loss = twin(on_device)
        twin.synchronize()
        return float(loss)

    return Side(name, step)


def step_work(c: ModelConfig, config: Any, batch: Mapping[str, np.ndarray]) -> Work:
    """Return the work that our step performs."""
    program, _ = setting.our_program(c, config, jax.devices()[0])
    traced = program.step.trace(program.state, setting.abstract(batch))
    return jaxpr_work(traced.jaxpr.jaxpr)


def nominal_work(c: ModelConfig, config: Any, batch: Mapping[str, np.ndarray]) -> Work:
    """Return the work of the step if every layer computed all positions, without recomputation."""
    with every_position():
        return step_work(dataclasses.replace(c, remat="none"), config, batch)


def work_of_a_clip(
    c: ModelConfig, config: Any, batch: Mapping[str, np.ndarray], clips: int, results: Results
) -> tuple[float, float]:
    """Return the FLOPs of one clip, performed and nominal, and add them to the results."""
    performed = step_work(c, config, batch).flops / clips
    nominal = nominal_work(c, config, batch).flops / clips
    results.add(
        "work of a clip",
        f"{performed / 1e9:,.1f} GFLOP performed, {nominal / 1e9:,.1f} nominal",
        performed=performed,
        nominal=nominal,
    )
    return performed, nominal


@contextlib.contextmanager
def every_position() -> Iterator[None]:
    """Make every block compute all positions, even those that nothing reads."""
    call = layers.Block.__call__

    def whole(self, x, mask=None, keep=None):
        y = call(self, x, mask)
        return y if keep is None else layers.take_positions(y, keep)

    layers.Block.__call__ = whole
    try:
        yield
    finally:
        layers.Block.__call__ = call
