"""THE loop, for pre-training and every fine-tuning.

A run is a function of its configuration: the batch and the random key of a step depend on the
seed and the step alone, so a run that was stopped and started again is, bit for bit, the run that
was not.

The compiled step is in `program`, the batches are in `batches`, what a work directory holds is
checked in `workdir`.
"""

import dataclasses
import functools
import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from stoa_jax import checkpoint, monitor, sharding, writers
from stoa_jax.batches import Prefetch, make_loader
from stoa_jax.errors import UserError
from stoa_jax.models.stoa import Stoa
from stoa_jax.program import State, make_program
from stoa_jax.workdir import check_config, claim_workdir, config_json, flat_config, write_config

PROFILE_STEPS = (5, 10)  # --mode=profile traces from the first of these to the second


class TrainingError(Exception):
    """A run that cannot go on. `main` prints its one line and exits with code 1."""


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
        reinit = re.compile(self.c.init.reinit or r"(?!)")
        for name, value in loaded.items():
            if reinit.search(name):
                continue
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

    def batches(self, step: int) -> Prefetch:
        return Prefetch(
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
