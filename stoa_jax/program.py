"""The compiled training step, the state that it updates, and the sharding of that state.

`train` runs the step; `plan` compiles it for hardware that is not attached.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from absl import logging
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from stoa_jax import averages, optim, sharding
from stoa_jax.models.parameters import named_parameters, with_parameters
from stoa_jax.models.stoa import Stoa

if TYPE_CHECKING:  # the step itself needs JAX, Flax and Optax only
    from ml_collections import ConfigDict

    from stoa_jax.tasks import Task


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("step", "params", "opt_state", "skipped", "streak"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that a training step updates."""

    step: jax.Array  # int32
    params: dict[str, jax.Array]  # float32, by name
    opt_state: optax.OptState  # for the trainable parameters only
    skipped: jax.Array  # int32: steps skipped because the loss or gradient was not finite
    streak: jax.Array  # int32: how many of the latest steps in a row were skipped


@dataclasses.dataclass(frozen=True)
class Program:
    """The jitted functions of a run, with the abstract state and its shardings."""

    mesh: Mesh
    state: State  # abstract
    shardings: State
    init: Callable[[], State]
    start: Callable[[dict[str, jax.Array]], State]  # builds a state around given parameters
    step: Callable[[State, dict[str, jax.Array]], tuple[State, jax.Array]]
    metrics: list[str]  # names of the entries of the step's second output; filled by tracing
    model: Stoa  # abstract
    rates: dict[str, float]  # peak learning rate of every parameter

    def model_with(self, params: Mapping[str, jax.Array]) -> Stoa:
        """Return the model with these parameters."""
        return with_parameters(self.model, params)


def make_program(
    c: "ConfigDict",
    task: "Task",
    steps: int,
    build_model: Callable[..., Stoa] = Stoa,
    devices: Sequence[Any] | None = None,
) -> Program:
    """Build the mesh, the abstract state and its shardings, and jit initialisation and step.

    Nothing is compiled or allocated before the returned functions are called.
    """
    mesh = sharding.make_mesh(c, devices)
    sharding.check_batch(c, mesh, evaluation=False)

    def build() -> Stoa:
        return build_model(task.model_config(), rngs=nnx.Rngs(c.seed))

    model = jax.eval_shape(build)
    shapes = named_parameters(model)
    specs = sharding.param_specs(shapes, mesh)
    rates, unused = optim.learning_rates(c, shapes)
    for pattern in unused:
        logging.warning("config.optim.groups: %r applies to no parameter", pattern)
    optimizer = optim.make_optimizer(c, rates, steps)
    schedule = optim.schedule(c, steps)

    def start(params: dict[str, jax.Array]) -> State:
        zero = jnp.zeros((), jnp.int32)
        return State(zero, params, optimizer.init(optim.trainable(params, rates)), zero, zero)

    state = jax.eval_shape(lambda: start(named_parameters(build())))
    shardings = sharding.state_shardings(state, specs, mesh)
    metrics: list[str] = []

    def step(state: State, batch: dict[str, jax.Array]) -> tuple[State, jax.Array]:
        state, values = update(c, task, model, optimizer, rates, shardings.params, state, batch)
        values["schedule"] = jnp.asarray(schedule(state.step - 1 - state.skipped))
        metrics[:] = sorted(values)
        # one array, so that all metrics reach the host in one transfer
        return state, jnp.stack([values[name].astype(jnp.float32) for name in metrics])

    replicated = sharding.replicated(mesh)
    return Program(
        mesh=mesh,
        state=state,
        shardings=shardings,
        init=jax.jit(lambda: start(named_parameters(build())), out_shardings=shardings),
        start=jax.jit(start, out_shardings=shardings),
        step=jax.jit(
            step,
            in_shardings=(shardings, sharding.batch_sharding(mesh)),
            out_shardings=(shardings, replicated),
            donate_argnums=0,
        ),
        metrics=metrics,
        model=model,
        rates=rates,
    )


def update(
    c: "ConfigDict",
    task: "Task",
    model: Stoa,
    optimizer: optax.GradientTransformationExtraArgs,
    rates: Mapping[str, float],
    param_shardings: Mapping[str, NamedSharding],
    state: State,
    batch: dict[str, jax.Array],
) -> tuple[State, dict[str, jax.Array]]:
    """Take one optimizer step; return the new state and the step's metrics.

    If the loss or the gradient is not finite, only the counters of the state change.
    """
    key = jax.random.fold_in(jax.random.key(c.seed), state.step)
    trainable = optim.trainable(state.params, rates)
    # Gather what FSDP shards once per step, and shard the gradient again. Otherwise the compiler
    # shards some products by their weights and moves activations between devices.
    gathered = sharding.constrain(state.params, sharding.gathered(param_shardings))

    def loss_of(trainable, batch, key):
        return task.loss(with_parameters(model, {**gathered, **trainable}), batch, key)

    def gradient(params, batch, key):
        output, grads = jax.value_and_grad(loss_of, has_aux=True)(
            optim.trainable(params, rates), batch, key
        )
        return output, sharding.constrain(grads, param_shardings)

    parts = c.train.accumulate
    if parts == 1:
        (loss, metrics), grads = gradient(gathered, batch, key)
    else:
        # Row i goes to micro-batch i % parts, so that every device keeps its own rows.
        micro_batches = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0),
            batch,
        )

        parts_of_batch = (jnp.arange(parts), micro_batches)

        def count(_, part):
            index, rows = part
            with averages.recording() as counts:
                loss_of(trainable, rows, jax.random.fold_in(key, index))
            return None, counts

        _, counts = jax.lax.scan(count, None, parts_of_batch)
        totals = [count.sum(0) for count in counts]

        def add(total, part):
            index, rows = part
            with averages.over(totals, parts):
                output = gradient(gathered, rows, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, total, output), None

        first = jax.tree.map(lambda x: x[0], micro_batches)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, gathered, first, key)
        )
        total, _ = jax.lax.scan(add, zeros, parts_of_batch)
        (loss, metrics), grads = jax.tree.map(lambda x: x / parts, total)

    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)

    def apply(trainable, opt_state, grads):
        updates, opt_state = optimizer.update(grads, opt_state, trainable, norm=norm)
        updated: Any = optax.apply_updates(trainable, updates)
        if "logit_scale" in trainable:  # CLIP's limit; inside the loss it would stop the gradient
            updated["logit_scale"] = jnp.minimum(updated["logit_scale"], jnp.log(100.0))
        return updated, opt_state

    updated, opt_state = jax.lax.platform_dependent(
        finite,
        (trainable, state.opt_state),
        grads,
        cpu=functools.partial(_apply_by_branch, apply),
        default=functools.partial(_apply_by_selection, apply),
    )
    params = {**state.params, **updated}
    skipped = (~finite).astype(jnp.int32)
    state = State(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        skipped=state.skipped + skipped,
        streak=jnp.where(finite, 0, state.streak + 1),
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


# Both apply an update only if `finite`. A CPU takes a third of the time if it does not read the old
# values to choose between them; a GPU would wait for its host to choose a branch.


def _apply_by_branch(apply, finite, old, grads):
    return jax.lax.cond(finite, apply, lambda *values: values[:-1], *old, grads)


def _apply_by_selection(apply, finite, old, grads):
    return jax.tree.map(lambda x, y: jnp.where(finite, x, y), apply(*old, grads), old)
