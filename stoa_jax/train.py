"""THE loop, for pre-training and every fine-tuning.

A run is a function of its configuration: the batch and the random key of a step depend on the
seed and the step alone, so a run that was stopped and started again is, bit for bit, the run that
was not.
"""

import dataclasses
import functools
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from stoa_jax import checkpoint, config, monitor, optim, sharding, writers
from stoa_jax.errors import UserError
from stoa_jax.models.parameters import named_parameters, with_parameters
from stoa_jax.models.stoa import Stoa

# What may differ when a run is continued: where it runs, and what it writes down.
MAY_CHANGE = (
    *("mesh.", "log.", "faults.", "checkpoint.", "eval.", "data.dir", "data.workers"),
    *("data.prefetch", "model.scan_layers", "model.remat"),
)
PROFILE_STEPS = (5, 10)  # --mode=profile traces from the first of these to the second


class TrainingError(Exception):
    """A run that cannot go on. `main` prints its one line and exits with code 1."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("step", "params", "opt_state", "skipped", "streak"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class State:
    """All that a step changes."""

    step: jax.Array  # int32
    params: dict[str, jax.Array]  # float32, by name
    opt_state: Any  # of the trainable parameters
    skipped: jax.Array  # int32: steps without an update, because something was not finite
    streak: jax.Array  # int32: such steps in a row, up to now


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled parts of a run, which `plan` lowers and `train` executes."""

    mesh: Mesh
    state: State  # abstract
    shardings: State
    init: Callable[[], State]
    start: Callable[[dict[str, jax.Array]], State]  # from parameters
    step: Callable[[State, dict[str, jax.Array]], tuple[State, jax.Array]]
    metrics: list[str]  # names of the step's second output, known once it is traced
    model: Any  # abstract
    rates: dict[str, float]

    def model_with(self, params: Mapping[str, jax.Array]) -> Any:
        """The model of a state's parameters."""
        return with_parameters(self.model, params)


def make_program(
    c: ConfigDict,
    task: Any,
    steps: int,
    build_model: Callable[..., Any] = Stoa,
    devices: list[Any] | None = None,
) -> Program:
    """Mesh, abstract state, shardings, and the jitted initialisation and step."""
    mesh = sharding.make_mesh(c, devices)
    sharding.check_batch(c, mesh, evaluation=False)

    def build() -> Any:
        return build_model(task.model_config(), rngs=nnx.Rngs(c.seed))

    model = jax.eval_shape(build)
    shapes = named_parameters(model)
    specs = sharding.param_specs(shapes, mesh)
    rates, unused = optim.learning_rates(c, shapes)
    for pattern in unused:
        logging.warning("config.optim.groups: %r is the first fit of no parameter", pattern)
    optimizer = optim.make_optimizer(c, rates, steps)
    share = optim.schedule(c, steps)

    def start(params: dict[str, jax.Array]) -> State:
        zero = jnp.zeros((), jnp.int32)
        return State(zero, params, optimizer.init(optim.trainable(params, rates)), zero, zero)

    state = jax.eval_shape(lambda: start(named_parameters(build())))
    shardings = sharding.state_shardings(state, specs, mesh)
    metrics: list[str] = []

    def step(state: State, batch: dict[str, jax.Array]) -> tuple[State, jax.Array]:
        state, found = update(c, task, model, optimizer, rates, state, batch)
        found["schedule"] = share(state.step - 1 - state.skipped)
        metrics[:] = sorted(found)
        # One array, so that fetching it is one transfer.
        return state, jnp.stack([found[name].astype(jnp.float32) for name in metrics])

    whole = sharding.replicated(mesh)
    return Program(
        mesh=mesh,
        state=state,
        shardings=shardings,
        init=jax.jit(lambda: start(named_parameters(build())), out_shardings=shardings),
        start=jax.jit(start, out_shardings=shardings),
        step=jax.jit(
            step,
            in_shardings=(shardings, sharding.batch_sharding(mesh)),
            out_shardings=(shardings, whole),
            donate_argnums=0,
        ),
        metrics=metrics,
        model=model,
        rates=rates,
    )


def update(
    c: ConfigDict,
    task: Any,
    model: Any,
    optimizer: optax.GradientTransformation,
    rates: Mapping[str, float],
    state: State,
    batch: dict[str, jax.Array],
) -> tuple[State, dict[str, jax.Array]]:
    """One step, and what there is to say of it."""
    key = jax.random.fold_in(jax.random.key(c.seed), state.step)
    free = optim.trainable(state.params, rates)

    def loss_of(free, batch, key):
        return task.loss(with_parameters(model, {**state.params, **free}), batch, key)

    gradient = jax.value_and_grad(loss_of, has_aux=True)
    parts = c.train.accumulate
    if parts == 1:
        (loss, metrics), grads = gradient(free, batch, key)
    else:
        # Row i goes to micro-batch i % parts, so that every device keeps the rows it has.
        micro = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0),
            batch,
        )

        def add(total, part):
            index, rows = part
            found = gradient(free, rows, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, total, found), None

        first = jax.tree.map(lambda x: x[0], micro)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, free, first, key)
        )
        total, _ = jax.lax.scan(add, zeros, (jnp.arange(parts), micro))
        (loss, metrics), grads = jax.tree.map(lambda x: x / parts, total)

    norm = optax.tree.norm(grads)
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, free)
    updated = {**state.params, **optax.apply_updates(free, updates)}
    # A step that is not finite changes nothing; it is counted.
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(good, new, old),
        (updated, opt_state),
        (state.params, state.opt_state),
    )
    bad = (~good).astype(jnp.int32)
    state = State(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        skipped=state.skipped + bad,
        streak=jnp.where(good, 0, state.streak + 1),
    )
    metrics = {
        **metrics,
        "loss": loss,
        "grad_norm": norm,
        **{f"grad_norm/{k}": v for k, v in optim.norms_by_module(grads).items()},
        "nonfinite/total": state.skipped,
        "nonfinite/in_a_row": state.streak,
    }
    return state, metrics


def train(
    c: ConfigDict,
    workdir: str | Path,
    *,
    task: Any = None,
    build_model: Callable[..., Any] = Stoa,
    open_loader: Callable[[int], Any] | None = None,
    profile: bool = False,
) -> dict[str, float]:
    """Train to the end, or go on with what the work directory holds; returns the last figures.

    `open_loader(start_step)` brings other batches than the configuration's.
    """
    workdir = Path(workdir).absolute()
    check_config(c)
    claim_workdir(c, workdir)
    # A mesh or a batch that does not fit is said before any data or model is read.
    sharding.check_batch(c, sharding.make_mesh(c))
    if task is None:
        from stoa_jax.tasks import make_task

        task = make_task(c)
    open_loader = open_loader or functools.partial(make_loader, c, task)
    loader = open_loader(0)
    steps = c.train.steps
    if c.train.epochs > 0:
        steps = max(round(c.train.epochs * loader.steps_per_epoch), 1)
    if profile:
        steps = min(steps, PROFILE_STEPS[1])
    program = make_program(c, task, steps, build_model)
    with (
        jax.set_mesh(program.mesh),
        monitor.Stopper(c.faults.grace_seconds) as stopper,
        monitor.Watchdog(c.faults.stall_seconds, workdir) as dog,
    ):
        return _Run(c, workdir, task, program, open_loader, steps, stopper, dog, profile).run()


class _Run:
    """One process's part in a run."""

    def __init__(self, c, workdir, task, program, open_loader, steps, stopper, dog, profile):
        self.c, self.workdir, self.task, self.program = c, workdir, task, program
        self.open_loader, self.steps, self.profile = open_loader, steps, profile
        self.stopper, self.dog = stopper, dog
        self.offset = 0  # batches left out by roll-backs: position in the data minus step
        self.rollbacks = 0
        self.clock = monitor.Clock()
        self.last: dict[str, float] = {}
        self.checkpoints = None if profile else checkpoint.Checkpoints(workdir, c)
        self.first = jax.process_index() == 0

    def run(self) -> dict[str, float]:
        self.dog.beat("restoring or initialising", patience=4)
        state, step = self.restore()
        # Only now, that nothing more is known to be amiss, is the directory this run's.
        write_config(self.c, self.workdir)
        self.writer = self.open_writer(step)
        self.progress = monitor.Progress(self.steps, step, self.first and self.c.log.progress)
        batches = self.batches(step)
        stopped, tick = False, 0
        try:
            if self.due(step) and not self.evaluated(step):
                self.evaluate(state, step)
            pending: list[tuple[int, jax.Array]] = []
            while step < self.steps:
                if self.profile and step == PROFILE_STEPS[0]:
                    jax.profiler.start_trace(str(self.workdir / "profile"))
                waiting = time.monotonic()
                batch = next(batches)
                waited = time.monotonic() - waiting
                with jax.transfer_guard("disallow"):
                    state, figures = self.program.step(state, batch)
                step += 1
                pending.append((step, figures))
                # The step before this one is done, or nearly: looking at it holds nothing up.
                # Before the state is used for anything else, the step itself is looked at.
                tick += 1  # not the step: a roll-back would turn it back
                stopped = stopped or self.stopper.now(tick)
                edge = stopped or self.due(step) or self.save_due(step) or step == self.steps
                streak, seen = 0, step
                while len(pending) > (0 if edge else 1) and streak < self.c.faults.max_nonfinite:
                    seen, figures = pending.pop(0)
                    streak = self.look(seen, figures)
                self.clock.step(waited)
                self.progress.step(step)
                if streak >= self.c.faults.max_nonfinite:
                    batches.close()
                    state, step = self.roll_back(seen)
                    pending.clear()
                    batches = self.batches(step)
                elif not stopped and edge and (streak == 0 or step == self.steps):
                    self.evaluate_and_save(state, step)
                if stopped:
                    self.save(state, step)
                    break
                self.dog.beat(f"after step {step}")
        except monitor.Preempted:
            stopped = True
            self.save(state, step)
        except Exception:
            # What is being saved is saved; with several processes, peers may be waited for in vain.
            if self.checkpoints and jax.process_count() == 1:
                self.checkpoints.wait()
            raise
        finally:
            batches.close()
            self.writer.close()
            if self.profile and step > PROFILE_STEPS[0]:
                jax.profiler.stop_trace()
        if self.checkpoints:
            self.dog.beat("writing the last checkpoint")
            self.checkpoints.close()
        if stopped:
            monitor.say(f"saved step {step}; run the same command again to go on")
        elif self.first and not self.profile:
            summary = {"task": self.c.task, "step": step, **self.last}
            (self.workdir / "result.json").write_text(json.dumps(summary, indent=2) + "\n")
        return {**self.last, "step": step, "stopped": stopped}

    # Where it starts.

    def restore(self) -> tuple[State, int]:
        """The newest good checkpoint, else the weights that `init.path` names, else fresh ones."""
        program = self.program
        place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)  # noqa: E731
        abstract = jax.tree.map(place, program.state, program.shardings)
        if self.checkpoints:
            rest = checkpoint.flatten(dataclasses.replace(abstract, params={}))
            if found := self.checkpoints.restore(abstract.params, rest):
                step, params, rest, meta = found
                self.offset, self.rollbacks = meta["offset"], meta["rollbacks"]
                self.clock = monitor.Clock(meta["started"], meta["productive"])
                like = dataclasses.replace(abstract, params={})
                state = dataclasses.replace(checkpoint.unflatten(like, rest), params=params)
                monitor.say(f"going on from step {step}")
                return state, step
        self.offset = 0
        if not self.c.init.path:
            return program.init(), 0
        return program.start(self.initial(program.init().params)), 0

    def initial(self, params: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Fresh parameters, with those that `init.path` brings in their place."""
        from stoa_jax.weights import initial_parameters

        loaded, report = initial_parameters(
            self.c.init.path, self.task.model_config(), seed=self.c.seed
        )
        if self.first:
            monitor.say(str(report))
        for name, value in loaded.items():
            if name not in params or params[name].shape != value.shape:
                there = params[name].shape if name in params else "no such parameter"
                raise UserError(
                    f"config.init.path: {name} is {value.shape} in {self.c.init.path}, the model "
                    f"has {there}; use weights of this model or change config.model"
                )
            whole = np.asarray(value, params[name].dtype)
            params[name] = jax.make_array_from_callback(
                whole.shape, params[name].sharding, whole.__getitem__
            )
        return params

    def batches(self, step: int) -> "_Prefetch":
        return _Prefetch(
            self.open_loader(step + self.offset),
            lambda rows: sharding.to_devices(rows, self.program.mesh, self.c.train.batch_size),
            self.c.data.prefetch,
        )

    def open_writer(self, step: int) -> writers.Writer:
        if not self.first or self.profile:
            return writers.Writers(())
        found: list[writers.Writer] = [writers.JsonLines(self.workdir / "metrics.jsonl", step)]
        if self.c.log.tensorboard:
            found.append(writers.TensorBoard(self.workdir / "tensorboard", step))
        for row in writers.read_lines(self.workdir / "metrics.jsonl"):
            self.last.update(row)
        self.last.pop("step", None)
        writer = writers.Writers(found)
        writer.write_hparams(flat_config(self.c))
        return writer

    # What it says.

    def look(self, step: int, figures: jax.Array) -> int:
        """Fetch a step's figures, write them if it is time; how many in a row were not finite."""
        values = dict(zip(self.program.metrics, jax.device_get(figures).tolist(), strict=True))
        if values["nonfinite/in_a_row"]:
            logging.warning("step %d is not finite and changed nothing", step)
        if step % self.c.log.every_steps == 0 or step == self.steps:
            size = self.c.train.batch_size
            weights = {
                f"weight/{name}": weight
                for name, weight in self.c.loss.items()
                if f"loss_{name}" in values
            }
            values = {
                **values,
                **weights,
                **self.clock.figures(size),
                **monitor.memory(),
                "nonfinite/rollbacks": self.rollbacks,
            }
            self.last = {**self.last, **values}
            self.writer.write_scalars(step, values)
            shown = {k: values[k] for k in sorted(values) if k.startswith("loss")}
            self.progress.line(step, {**shown, "grad_norm": values["grad_norm"]}, size)
            if self.checkpoints:
                self.checkpoints.check()
        return int(values["nonfinite/in_a_row"])

    # What it does now and then.

    def due(self, step: int) -> bool:
        """Is this step evaluated?"""
        every = self.c.eval.every_steps
        return (
            not self.profile
            and every >= 0
            and step > 0
            and (step == self.steps or (every > 0 and step % every == 0))
        )

    def save_due(self, step: int) -> bool:
        every = self.c.checkpoint.every_steps
        return not self.profile and (step == self.steps or (every > 0 and step % every == 0))

    def evaluate_and_save(self, state: State, step: int) -> None:
        best = self.c.checkpoint.best_metric
        if self.save_due(step) and not (best and self.due(step)):
            self.save(state, step)
        if self.due(step):
            values = self.evaluate(state, step)
            if best:
                self.save(state, step, values)

    def evaluated(self, step: int) -> bool:
        """Did an earlier start already write this step's evaluation?"""
        path = self.workdir / "metrics.jsonl"
        here = self.first and any(
            row["step"] == step and "time/eval" in row for row in writers.read_lines(path)
        )
        if jax.process_count() > 1:
            here = bool(multihost_utils.broadcast_one_to_all(np.int32(here)))
        return here

    def evaluate(self, state: State, step: int) -> dict[str, float]:
        """Run the task's evaluators on the state."""
        began = time.monotonic()
        model = self.program.model_with(state.params)
        values: dict[str, float] = {}
        with self.stopper.interruptible():
            for name, evaluator in self.task.evaluators().items():
                self.dog.beat(f"evaluating {name}", patience=4)
                for key, value in evaluator(model, self.program.mesh):
                    values[f"eval/{key}"] = float(value)
                    self.dog.beat(f"evaluating {name}", patience=4)
        if values:
            self.progress.figures(step, values)
            self.last = {**self.last, **values}
            self.writer.write_scalars(step, {**values, "time/eval": time.monotonic() - began})
        self.clock.pause()
        return values

    def save(self, state: State, step: int, values: Mapping[str, float] | None = None) -> None:
        """Begin to write a checkpoint."""
        if self.checkpoints is None:
            return
        self.dog.beat(f"saving step {step}")
        metrics = None
        if best := self.c.checkpoint.best_metric:
            found = {k.removeprefix("eval/"): v for k, v in (values or {}).items()}
            best_key = best.removeprefix("eval/")
            if values and best_key not in found:
                raise UserError(
                    f"config.checkpoint.best_metric: the evaluation gave no {best!r}; "
                    f"it gave {', '.join(sorted(found))}"
                )
            metrics = {best: found[best_key]} if values else None
        meta = {
            "offset": self.offset,
            "rollbacks": self.rollbacks,
            "started": self.clock.started,
            "productive": self.clock.productive,
            "seed": self.c.seed,
            "task": self.c.task,
            "model": dataclasses.asdict(self.task.model_config()),
            "config": config_json(self.c),
            "extras": getattr(self.task, "extras", dict)(),
        }
        rest = checkpoint.flatten(dataclasses.replace(state, params={}))
        self.checkpoints.save(step, state.params, rest, meta, metrics)
        self.clock.pause()

    def roll_back(self, step: int) -> tuple[State, int]:
        """To the last good checkpoint, and over the stretch of data since then."""
        position = step + self.offset
        rollbacks = self.rollbacks + 1
        if rollbacks > self.c.faults.max_rollbacks:
            raise TrainingError(
                f"step {step}: the loss or gradient was not finite "
                f"{self.c.faults.max_nonfinite} times in a row, after {self.rollbacks} roll-backs "
                "(faults.max_rollbacks); lower the learning rate or look at the data there"
            )
        self.dog.beat("rolling back", patience=4)
        if self.checkpoints:
            self.checkpoints.wait()
        state, to = self.restore()
        self.offset, self.rollbacks = position - to, rollbacks
        logging.error(
            "rolled back from step %d to %d; the data goes on with batch %d (roll-back %d of %d)",
            *(step, to, position, rollbacks, self.c.faults.max_rollbacks),
        )
        self.progress.rewind(to)
        self.clock.pause()
        return state, to


class _Prefetch(Iterator[dict[str, jax.Array]]):
    """Batches on the devices, some ahead of the loop, made by a thread."""

    def __init__(self, batches: Iterable[Any], place: Callable[[Any], Any], ahead: int):
        self._source, self._place = batches, place
        self._iterator = iter(batches)
        self._queue: queue.Queue[Any] = queue.Queue(max(ahead, 1))
        self._closed = threading.Event()
        self._thread = None
        if ahead > 0:
            self._thread = threading.Thread(target=self._fill, name="prefetch", daemon=True)
            self._thread.start()

    def __next__(self) -> dict[str, jax.Array]:
        if self._thread is None:
            return self._place(next(self._iterator))
        found = self._queue.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def _fill(self) -> None:
        try:
            while not self._closed.is_set():
                self._put(self._place(next(self._iterator)))
        except BaseException as error:
            self._put(error)

    def _put(self, item: Any) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(item, timeout=0.2)
            except queue.Full:
                continue

    def close(self) -> None:
        """Stop the thread and the loader under it."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
        if hasattr(self._source, "close"):
            self._source.close()


def check_config(c: ConfigDict) -> None:
    """Numbers that cannot be, each in one line."""
    config.model_config(c)
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


# The work directory.


def config_json(c: ConfigDict) -> dict[str, Any]:
    """The configuration as JSON holds it."""
    return json.loads(json.dumps(c.to_dict()))


def flat_config(c: ConfigDict | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"train.steps": 1000, …}`."""
    flat: dict[str, Any] = {}
    for key, value in c.items():
        if isinstance(value, ConfigDict | Mapping):
            flat.update(flat_config(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def claim_workdir(c: ConfigDict, workdir: Path) -> None:
    """Is it writable, and no other configuration's?"""
    if "://" in str(workdir) or ":/" in str(workdir):
        raise UserError(
            f"--workdir: {workdir} is no path; mount the bucket (gcsfuse) and name its directory"
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
    old, new = flat_config(json.loads(path.read_text())), flat_config(config_json(c))
    differ = [
        f"{key} {old.get(key)!r} → {new.get(key)!r}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key) and not key.startswith(MAY_CHANGE)
    ]
    if differ:
        more = f" and {len(differ) - 4} more" if len(differ) > 4 else ""
        raise UserError(
            f"--workdir: {workdir} holds the run of another configuration: "
            f"{'; '.join(differ[:4])}{more}; name another directory"
        )


def write_config(c: ConfigDict, workdir: Path) -> None:
    """Mark the work directory as this configuration's."""
    if jax.process_index() == 0:
        part = workdir / "config.json.part"
        part.write_text(json.dumps(config_json(c), indent=2) + "\n")
        os.replace(part, workdir / "config.json")


def make_loader(c: ConfigDict, task: Any, start_step: int) -> Any:
    """The training batches that the configuration names."""
    from stoa_jax.data import pipeline

    folder = c.data.dir or os.environ.get("STOA_DATA", "data")
    sets = [(pipeline.open_split(folder, name, c.data.train_split), w) for name, w in c.data.sets]
    return pipeline.Loader(
        sets,
        task.batch_spec(train=True),
        batch_size=c.train.batch_size,
        seed=c.seed,
        train=True,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=c.data.workers,
        prefetch=c.data.prefetch,
        start_step=start_step,
    )
