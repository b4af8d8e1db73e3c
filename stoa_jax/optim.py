"""The optimizer: AdamW with a learning rate for each group of parameters.

Everything is keyed by parameter name, and every rule is an ordered (regex, value) list in which
the first that fits wins. A rate of 0 freezes: no gradient is taken and no moments are stored.
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


def first_match(
    rules: Sequence[tuple[str, Any]], names: Iterable[str], what: str
) -> tuple[dict[str, Any], list[str]]:
    """For each name the value of the first rule that fits; also the rules that no name needed."""
    found: dict[str, Any] = {}
    used: set[str] = set()
    missing = []
    for name in names:
        for pattern, value in rules:
            if re.search(pattern, name):
                found[name] = value
                used.add(pattern)
                break
        else:
            missing.append(name)
    if missing:
        raise UserError(
            f"{what}: no rule fits {len(missing)} parameter(s), the first {missing[0]!r}; "
            "add a last rule ('.*', ...)"
        )
    return found, [pattern for pattern, _ in rules if pattern not in used]


def learning_rates(c: "ConfigDict", names: Iterable[str]) -> tuple[dict[str, float], list[str]]:
    """Peak learning rate of every parameter, and the groups that fit no parameter."""
    rates, unused = first_match(tuple(c.optim.groups), names, "config.optim.groups")
    for name, rate in rates.items():
        if not isinstance(rate, int | float) or not 0 <= rate < float("inf"):
            raise UserError(
                f"config.optim.groups: the learning rate of {name} is {rate!r}; "
                "it must be 0 (frozen) or above"
            )
    return {name: float(rate) for name, rate in rates.items()}, unused


def trainable(params: Mapping[str, Any], rates: Mapping[str, float]) -> dict[str, Any]:
    """The parameters whose rate is above 0."""
    return {name: value for name, value in params.items() if rates[name] > 0}


def schedule(c: "ConfigDict", steps: int) -> optax.Schedule:
    """The share of its peak that every learning rate has at an update."""
    warmup = round(c.optim.warmup * steps)
    if c.optim.schedule == "cosine":
        after = optax.cosine_decay_schedule(1.0, max(steps - warmup, 1))
    elif c.optim.schedule == "constant":
        after = optax.constant_schedule(1.0)
    else:
        raise UserError(
            f"config.optim.schedule: {c.optim.schedule!r} is not known; use cosine or constant"
        )

    def share(count: jax.Array) -> jax.Array:
        # The first update already has a rate: with count / warmup it would be lost.
        rising = (count + 1) / max(warmup, 1)
        return jnp.where(count < warmup, rising, after(count - warmup))

    return share


def make_optimizer(
    c: "ConfigDict", rates: Mapping[str, float], steps: int
) -> optax.GradientTransformation:
    """AdamW over a flat dict of the trainable parameters."""
    beta1, beta2 = c.optim.betas
    share = schedule(c, steps)

    def decays(params: Mapping[str, Any]) -> dict[str, bool]:
        return {name: not re.search(c.optim.no_decay, name) for name in params}

    def apply_rates(updates, params=None):
        del params
        return {name: -rates[name] * update for name, update in updates.items()}

    return optax.chain(
        optax.clip_by_global_norm(c.optim.clip_norm) if c.optim.clip_norm else optax.identity(),
        optax.scale_by_adam(b1=beta1, b2=beta2),
        optax.add_decayed_weights(c.optim.weight_decay, mask=decays),
        optax.scale_by_schedule(share),
        optax.stateless(apply_rates),
    )


def norms_by_module(grads: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The norm of the gradient of each module: the names' first parts."""
    squares: dict[str, jax.Array] = {}
    for name, grad in grads.items():
        module = name.split("/")[0]
        square = jnp.sum(jnp.square(grad.astype(jnp.float32)))
        squares[module] = squares[module] + square if module in squares else square
    return {module: jnp.sqrt(square) for module, square in squares.items()}
