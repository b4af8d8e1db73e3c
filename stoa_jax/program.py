"""The compiled parts of a run: what a step changes, how it is laid out, and the step itself.

`train` runs it, `plan` compiles it for machines that are not here.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from absl import logging
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from stoa_jax import optim, sharding
from stoa_jax.models.parameters import named_parameters, with_parameters
from stoa_jax.models.stoa import Stoa

if TYPE_CHECKING:  # the step itself needs JAX, Flax and Optax only
    from ml_collections import ConfigDict


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
    c: "ConfigDict",
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
        state, found = update(c, task, model, optimizer, rates, shardings.params, state, batch)
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
    c: "ConfigDict",
    task: Any,
    model: Any,
    optimizer: optax.GradientTransformation,
    rates: Mapping[str, float],
    places: Mapping[str, NamedSharding],
    state: State,
    batch: dict[str, jax.Array],
) -> tuple[State, dict[str, jax.Array]]:
    """One step, and what there is to say of it. `places` are the parameters'."""
    key = jax.random.fold_in(jax.random.key(c.seed), state.step)
    free = optim.trainable(state.params, rates)
    # What fsdp splits is gathered here and its gradient split again. Left to the compiler, some
    # products are split by their weights, and activations go between devices instead.
    whole = sharding.constrain(state.params, sharding.gathered(places))

    def loss_of(free, batch, key):
        return task.loss(with_parameters(model, {**whole, **free}), batch, key)

    def gradient(whole, batch, key):
        free = optim.trainable(whole, rates)
        found, grads = jax.value_and_grad(loss_of, has_aux=True)(free, batch, key)
        return found, sharding.constrain(grads, places)

    parts = c.train.accumulate
    if parts == 1:
        (loss, metrics), grads = gradient(whole, batch, key)
    else:
        # Row i goes to micro-batch i % parts, so that every device keeps the rows it has.
        micro = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0),
            batch,
        )

        def add(total, part):
            index, rows = part
            found = gradient(whole, rows, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, total, found), None

        first = jax.tree.map(lambda x: x[0], micro)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, whole, first, key)
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
