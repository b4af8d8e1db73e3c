"""The optimizer: AdamW with a learning rate for each group of parameters.

Parameters are addressed by name. Rules are ordered (regex, value) lists, and the first match wins.
A rate of 0 freezes a parameter: no gradient is computed and no moments are stored.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from stoa_jax.errors import UserError

if TYPE_CHECKING:  # the step itself needs JAX, Flax and Optax only
    from ml_collections import ConfigDict

EPSILON = 1e-8  # AdamW's, as in Optax and PyTorch


def first_match(
    rules: Sequence[tuple[str, Any]], names: Iterable[str], what: str
) -> tuple[dict[str, Any], list[str]]:
    """Return the value of the first rule that matches each name, and the patterns never used.

    Raises UserError if a name matches no rule; `what` names the rules in that error.
    """
    values: dict[str, Any] = {}
    used: set[str] = set()
    missing = []
    for name in names:
        for pattern, value in rules:
            if re.search(pattern, name):
                values[name] = value
                used.add(pattern)
                break
        else:
            missing.append(name)
    if missing:
        raise UserError(
            f"{what}: no rule matches {len(missing)} parameter(s), the first {missing[0]!r}; "
            "add a last rule ('.*', ...)"
        )
    return values, [pattern for pattern, _ in rules if pattern not in used]


def learning_rates(c: "ConfigDict", names: Iterable[str]) -> tuple[dict[str, float], list[str]]:
    """Return the peak learning rate of every parameter, and the groups that match none."""
    rates, unused = first_match(tuple(c.optim.groups), names, "config.optim.groups")
    for name, rate in rates.items():
        if not isinstance(rate, int | float) or not 0 <= rate < float("inf"):
            raise UserError(
                f"config.optim.groups: the learning rate of {name} is {rate!r}; "
                "it must be 0 (frozen) or a positive number"
            )
    return {name: float(rate) for name, rate in rates.items()}, unused


def trainable(params: Mapping[str, Any], rates: Mapping[str, float]) -> dict[str, Any]:
    """Return the parameters whose learning rate is above 0."""
    return {name: value for name, value in params.items() if rates[name] > 0}


def schedule(c: "ConfigDict", steps: int) -> optax.Schedule:
    """Return the schedule: update count → factor in [0, 1] on every peak learning rate."""
    warmup = round(c.optim.warmup * steps)
    if c.optim.schedule == "cosine":
        after = optax.cosine_decay_schedule(1.0, max(steps - warmup, 1))
    elif c.optim.schedule == "constant":
        after = optax.constant_schedule(1.0)
    else:
        raise UserError(
            f"config.optim.schedule: {c.optim.schedule!r} is not known; use cosine or constant"
        )

    def factor(count: Any) -> jax.Array:
        # count + 1, because a rate of 0 would waste the first update.
        rising = (count + 1) / max(warmup, 1)
        return jnp.where(count < warmup, rising, after(count - warmup))

    return factor


def make_optimizer(
    c: "ConfigDict", rates: Mapping[str, float], steps: int
) -> optax.GradientTransformationExtraArgs:
    """Build AdamW with clipping over a flat dict of the trainable parameters.

    The update is one expression for each parameter. A chain of Optax's stages computes the same,
    with buffers between the stages and in three times the time on a CPU. The state is laid out as
    that chain's, so that older checkpoints continue. `update` takes the gradients' global norm as
    `norm` if it is known.
    """
    beta1, beta2 = c.optim.betas
    factor = schedule(c, steps)

    def init(params: Any) -> tuple[Any, ...]:
        stateless = optax.EmptyState()
        scheduled = optax.ScaleByScheduleState(jnp.zeros([], jnp.int32))
        return stateless, optax.scale_by_adam().init(params), stateless, scheduled, stateless

    def update(
        updates: Any, state: Any, params: Any = None, *, norm: jax.Array | None = None
    ) -> tuple[Any, Any]:
        grads, updates, mu, nu = updates, {}, {}, {}
        _, adam, _, scheduled, _ = state
        count = optax.safe_increment(adam.count)
        correct_mu, correct_nu = 1 / (1 - beta1**count), 1 / (1 - beta2**count)
        shrink = 1.0
        if c.optim.clip_norm:
            norm = optax.tree.norm(grads) if norm is None else norm
            shrink = jnp.where(norm < c.optim.clip_norm, 1.0, c.optim.clip_norm / norm)
        for name, grad in grads.items():
            grad = grad * shrink
            mu[name] = beta1 * adam.mu[name] + (1 - beta1) * grad
            nu[name] = beta2 * adam.nu[name] + (1 - beta2) * jnp.square(grad)
            direction = mu[name] * correct_mu / (jnp.sqrt(nu[name] * correct_nu) + EPSILON)
            if not re.search(c.optim.no_decay, name):
                direction += c.optim.weight_decay * params[name]
            updates[name] = -rates[name] * factor(scheduled.count) * direction
        adam = adam._replace(count=count, mu=mu, nu=nu)
        scheduled = scheduled._replace(count=optax.safe_increment(scheduled.count))
        return updates, (state[0], adam, state[2], scheduled, state[4])

    return optax.GradientTransformationExtraArgs(init, update)


def norms_by_module(grads: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Return the gradient norm of each module; a module is the first part of a name."""
    squares: dict[str, jax.Array] = {}
    for name, grad in grads.items():
        module = name.split("/")[0]
        square = jnp.sum(jnp.square(grad.astype(jnp.float32)))
        squares[module] = squares[module] + square if module in squares else square
    return {module: jnp.sqrt(square) for module, square in squares.items()}
