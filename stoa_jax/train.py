"""The training loop, for pre-training and for every fine-tuning task.

A run is determined by its configuration: the batch and the random key of a step depend only on the
seed and the step number. A run that was stopped and resumed is therefore bit-identical to one that
was never stopped.

`program` compiles the step, `batches` provides the batches, and `workdir` checks the work
directory. The file is long so that the order of operations of a run can be read in one place.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from stoa_jax import checkpoint, files, monitor, sharding, writers
from stoa_jax.batches import DeviceLoader, Loader, Prefetch, make_loader
from stoa_jax.errors import UserError
from stoa_jax.kept_vision import KeptVision, check_keeps
from stoa_jax.models.stoa import Stoa
from stoa_jax.program import Program, State, make_program
from stoa_jax.workdir import (
    check_config,
    claim_workdir,
    config_json,
    flat_config,
    only_training,
    write_config,
)

if (
    TYPE_CHECKING
):  # the tasks read data sets; a caller that brings its own task needs no such reader
    from stoa_jax.tasks import Task

PROFILE_STEPS = (5, 10)  # --mode=profile traces the steps from the first number to the second


class TrainingError(Exception):
    """A run that cannot continue. `main` prints it in one line and exits with code 1."""


def train(
    c: ConfigDict,
    workdir: str | Path,
    *,
    task: "Task | None" = None,
    build_model: Callable[..., Stoa] = Stoa,
    open_loader: Callable[[int], Loader] | None = None,
    profile: bool = False,
) -> dict[str, float]:
    """Train to the last step and return the latest value of every metric.

    Resumes from the newest checkpoint in `workdir`, if there is one. `open_loader(start_step)`
    replaces the batches that the configuration names.
    """
    workdir = Path(workdir).absolute()
    check_config(c)
    claim_workdir(c, workdir)
    with only_training(workdir):
        # Fail on a mesh or batch size that does not fit before reading any data or weights.
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
        if c.train.keep_vision:
            check_keeps(c, program.rates)
        with (
            jax.set_mesh(program.mesh),
            monitor.Stopper(c.faults.grace_seconds) as stopper,
            monitor.Watchdog(c.faults.stall_seconds, workdir) as watchdog,
        ):
            return _Run(
                c, workdir, task, program, open_loader, steps, stopper, watchdog, profile
            ).run()


class _Run:
    """A run in progress, as one process sees it."""

    def __init__(
        self,
        c: ConfigDict,
        workdir: Path,
        task: "Task",
        program: Program,
        open_loader: Callable[[int], Loader],
        steps: int,
        stopper: monitor.Stopper,
        watchdog: monitor.Watchdog,
        profile: bool,
    ):
        self.c, self.workdir, self.task, self.program = c, workdir, task, program
        self.open_loader, self.steps, self.profile = open_loader, steps, profile
        self.stopper, self.watchdog = stopper, watchdog
        self.offset = 0  # batches skipped by roll-backs: position in the data minus step
        self.rollbacks = 0
        self.clock = monitor.Clock()
        self.latest: dict[str, float] = {}  # the latest value of every metric
        self.checkpoints = None if profile else checkpoint.Checkpoints(workdir, c)
        self.is_main = jax.process_index() == 0  # the process that writes logs and results
        self.kept_vision: KeptVision | None = None

    def run(self) -> dict[str, float]:
        """Train until the last step or until asked to stop; return the latest metrics."""
        self.watchdog.beat("restoring or initialising", patience=4)
        state, step = self.restore()
        if self.c.train.keep_vision:
            self.watchdog.beat("running the frozen vision tower over all clips", patience=20)
            self.kept_vision = KeptVision.of(self.program.model_with(state.params), self.task)
        # Claim the work directory only after restoring succeeded.
        write_config(self.c, self.workdir)
        self.writer = self.open_writer(step)
        self.progress = monitor.Progress(self.steps, step, self.is_main and self.c.log.progress)
        batches = self.batches(step)
        stopped, tick = False, 0
        try:
            if self.evaluation_due(step) and not self.already_evaluated(step):
                self.evaluate(state, step)
            pending: list[tuple[int, jax.Array]] = []  # steps whose metrics are still on the device
            while step < self.steps:
                if self.profile and step == PROFILE_STEPS[0]:
                    jax.profiler.start_trace(str(self.workdir / "profile"))
                waiting = time.monotonic()
                batch = next(batches)
                waited = time.monotonic() - waiting
                with jax.transfer_guard("disallow"):
                    state, metrics = self.program.step(state, batch)
                step += 1
                pending.append((step, metrics))
                tick += 1  # counts on after a roll-back, where `step` goes back
                stopped = stopped or self.stopper.should_stop(tick)
                at_boundary = (
                    stopped
                    or self.evaluation_due(step)
                    or self.save_due(step)
                    or step == self.steps
                )
                # Fetching the previous step's metrics does not delay the step in progress. At a
                # boundary the state is about to be used, so this step's metrics are fetched too.
                streak, fetched = 0, step
                keep = 0 if at_boundary else 1
                while len(pending) > keep and streak < self.c.faults.max_nonfinite:
                    fetched, metrics = pending.pop(0)
                    streak = self.fetch_metrics(fetched, metrics)
                self.clock.step(waited)
                self.progress.step(step)
                if streak >= self.c.faults.max_nonfinite:
                    batches.close()
                    state, step = self.roll_back(fetched)
                    pending.clear()
                    batches = self.batches(step)
                elif not stopped and at_boundary and (streak == 0 or step == self.steps):
                    self.evaluate_and_save(state, step)
                if stopped:
                    self.save(state, step)
                    break
                self.watchdog.beat(f"after step {step}")
        except monitor.Preempted:
            stopped = True
            self.save(state, step)
        except Exception:
            # Let a save in progress finish. With several processes this could wait forever, since
            # the others may already be gone.
            if self.checkpoints and jax.process_count() == 1:
                self.checkpoints.wait()
            raise
        finally:
            batches.close()
            self.writer.close()
            if self.profile and step > PROFILE_STEPS[0]:
                jax.profiler.stop_trace()
        if self.checkpoints:
            self.watchdog.beat("writing the last checkpoint")
            self.checkpoints.close()
        if stopped:
            monitor.say(f"saved step {step}; run the same command again to continue")
        elif self.is_main and not self.profile:
            summary = {"task": self.c.task, "step": step, **self.latest}
            files.write_json(self.workdir / "result.json", summary)
        return {**self.latest, "step": step, "stopped": stopped}

    # The initial state

    def restore(self) -> tuple[State, int]:
        """Return the state to start from, and its step.

        This is the newest intact checkpoint; without one, the weights that `init.path` names;
        without those, a fresh initialisation.
        """
        program = self.program

        def sharded(
            leaf: jax.ShapeDtypeStruct, placement: jax.sharding.Sharding
        ) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement)

        abstract = jax.tree.map(sharded, program.state, program.shardings)
        if self.checkpoints:
            rest = checkpoint.flatten(dataclasses.replace(abstract, params={}))
            if found := self.checkpoints.restore(abstract.params, rest):
                step, params, rest, meta = found
                self.offset, self.rollbacks = meta["offset"], meta["rollbacks"]
                self.clock = monitor.Clock(meta["started"], meta["productive"])
                like = dataclasses.replace(abstract, params={})
                state = dataclasses.replace(checkpoint.unflatten(like, rest), params=params)
                monitor.say(f"continuing from step {step}")
                return state, step
        self.offset = 0
        state = program.init()
        prepare = getattr(self.task, "prepare", None)
        if not self.c.init.path and prepare is None:
            return state, 0
        params = self.with_initial_weights(state.params) if self.c.init.path else state.params
        return program.start(params if prepare is None else prepare(params)), 0

    def with_initial_weights(self, params: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Replace fresh parameters by those at `init.path`, except where `init.reinit` matches."""
        from stoa_jax.weights import initial_parameters

        loaded, report = initial_parameters(
            self.c.init.path,
            self.task.model_config(),
            seed=self.c.seed,
            reinit=self.c.init.reinit,
        )
        if self.is_main:
            monitor.say(str(report))
        for name, value in loaded.items():
            if name not in params or params[name].shape != value.shape:
                expected = params[name].shape if name in params else "no such parameter"
                raise UserError(
                    f"config.init.path: {name} is {value.shape} in {self.c.init.path}, the model "
                    f"has {expected}; use weights of this model or change config.model"
                )
            host = np.asarray(value, params[name].dtype)
            params[name] = jax.make_array_from_callback(
                host.shape, params[name].sharding, host.__getitem__
            )
        return params

    def batches(self, step: int) -> Prefetch:
        """Open the training batches at a step, prefetched onto the devices."""
        mesh, kept = self.program.mesh, self.kept_vision
        loader = self.open_loader(step + self.offset)
        if isinstance(loader, DeviceLoader) and not kept:
            return Prefetch(loader, lambda b: loader.to_devices(b, mesh), self.c.data.prefetch)
        return Prefetch(
            loader,
            lambda rows: sharding.to_devices(
                kept.add_to(rows) if kept else rows, mesh, self.c.train.batch_size
            ),
            self.c.data.prefetch,
        )

    def open_writer(self, step: int) -> writers.Writer:
        """Open the metric writers, and take up the latest metrics of an earlier start."""
        if not self.is_main or self.profile:
            return writers.Writers(())
        found: list[writers.Writer] = [writers.JsonLines(self.workdir / "metrics.jsonl", step)]
        if self.c.log.tensorboard:
            found.append(writers.TensorBoard(self.workdir / "tensorboard", step))
        for row in writers.read_lines(self.workdir / "metrics.jsonl"):
            self.latest.update(row)
        self.latest.pop("step", None)
        writer = writers.Writers(found)
        writer.write_hparams(flat_config(self.c))
        return writer

    # Metrics

    def fetch_metrics(self, step: int, metrics: jax.Array) -> int:
        """Fetch a step's metrics from the device, and log them every `log.every_steps`.

        Returns the number of consecutive non-finite steps up to this one.
        """
        values = dict(zip(self.program.metrics, jax.device_get(metrics).tolist(), strict=True))
        if values["nonfinite/in_a_row"]:
            logging.warning("step %d: loss or gradient is not finite; the step was skipped", step)
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
                **self.clock.metrics(size),
                **monitor.memory(),
                "nonfinite/rollbacks": self.rollbacks,
            }
            self.latest = {**self.latest, **values}
            self.writer.write_scalars(step, values)
            shown = {k: values[k] for k in sorted(values) if k.startswith("loss")}
            self.progress.line(step, {**shown, "grad_norm": values["grad_norm"]}, size)
            if self.checkpoints:
                self.checkpoints.check()
        return int(values["nonfinite/in_a_row"])

    # Evaluation and checkpoints

    def evaluation_due(self, step: int) -> bool:
        """Return whether the model is evaluated after this step."""
        every = self.c.eval.every_steps
        return (
            not self.profile
            and every >= 0
            and step > 0
            and (step == self.steps or (every > 0 and step % every == 0))
        )

    def save_due(self, step: int) -> bool:
        """Return whether a checkpoint is written after this step."""
        every = self.c.checkpoint.every_steps
        return not self.profile and (step == self.steps or (every > 0 and step % every == 0))

    def evaluate_and_save(self, state: State, step: int) -> None:
        """Evaluate and save where due; with `best_metric`, every evaluation is saved."""
        best = self.c.checkpoint.best_metric
        if self.save_due(step) and not (best and self.evaluation_due(step)):
            self.save(state, step)
        if self.evaluation_due(step):
            values = self.evaluate(state, step)
            if best:
                self.save(state, step, values)

    def already_evaluated(self, step: int) -> bool:
        """Return whether the log already holds this step's evaluation, from an earlier start."""
        path = self.workdir / "metrics.jsonl"
        here = self.is_main and any(
            row["step"] == step and "time/eval" in row for row in writers.read_lines(path)
        )
        if jax.process_count() > 1:
            here = bool(multihost_utils.broadcast_one_to_all(np.int32(here)))
        return here

    def evaluate(self, state: State, step: int) -> dict[str, float]:
        """Run the task's evaluators on the state, and log what they report."""
        began = time.monotonic()
        model = self.program.model_with(state.params)
        values: dict[str, float] = {}
        with self.stopper.interruptible():
            for name, evaluator in self.task.evaluators().items():
                self.watchdog.beat(f"evaluating {name}", patience=4)
                for key, value in evaluator(model, self.program.mesh):
                    values[f"eval/{key}"] = float(value)
                    self.watchdog.beat(f"evaluating {name}", patience=4)
        if values:
            self.progress.table(step, values)
            self.latest = {**self.latest, **values}
            self.writer.write_scalars(step, {**values, "time/eval": time.monotonic() - began})
        self.clock.pause()
        return values

    def save(self, state: State, step: int, values: Mapping[str, float] | None = None) -> None:
        """Start writing a checkpoint in the background."""
        if self.checkpoints is None:
            return
        self.watchdog.beat(f"saving step {step}")
        metrics = None
        if best := self.c.checkpoint.best_metric:
            reported = {k.removeprefix("eval/"): v for k, v in (values or {}).items()}
            best_key = best.removeprefix("eval/")
            if values and best_key not in reported:
                raise UserError(
                    f"config.checkpoint.best_metric: the evaluation gave no {best!r}; "
                    f"it gave {', '.join(sorted(reported))}"
                )
            metrics = {best: reported[best_key]} if values else None
        meta = {
            "offset": self.offset,
            "rollbacks": self.rollbacks,
            "started": self.clock.started,
            "productive": self.clock.productive,
            "seed": self.c.seed,
            "task": self.c.task,
            "model": dataclasses.asdict(self.task.model_config()),
            "config": config_json(self.c),
            "extras": self.task.extras(),
        }
        rest = checkpoint.flatten(dataclasses.replace(state, params={}))
        self.checkpoints.save(step, state.params, rest, meta, metrics)
        self.clock.pause()

    def roll_back(self, step: int) -> tuple[State, int]:
        """Return to the last intact checkpoint, and skip the data used since then."""
        position = step + self.offset
        rollbacks = self.rollbacks + 1
        if rollbacks > self.c.faults.max_rollbacks:
            raise TrainingError(
                f"step {step}: the loss or gradient was not finite "
                f"{self.c.faults.max_nonfinite} times in a row, after {self.rollbacks} roll-backs "
                "(faults.max_rollbacks); lower the learning rate or inspect the data around this "
                "step"
            )
        self.watchdog.beat("rolling back", patience=4)
        if self.checkpoints:
            self.checkpoints.wait()
        state, restored = self.restore()
        self.offset, self.rollbacks = position - restored, rollbacks
        logging.error(
            "rolled back from step %d to %d; training continues with batch %d (roll-back %d of %d)",
            *(step, restored, position, rollbacks, self.c.faults.max_rollbacks),
        )
        self.progress.rewind(restored)
        self.clock.pause()
        return state, restored
