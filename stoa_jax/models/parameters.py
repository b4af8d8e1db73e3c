"""A model's parameters by name, as the optimizer, checkpoints and converters use them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import jax

from stoa_jax.errors import UserError

if TYPE_CHECKING:
    from flax import nnx

M = TypeVar("M")


def named_parameters(model: "nnx.Module | Mapping[str, nnx.Module]") -> dict[str, jax.Array]:
    """Return a module's parameters as `{"visual/blocks/mlp/up/kernel": array, …}`, sorted by name.

    The module may be abstract (the result of `jax.eval_shape`).
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    return dict(sorted((_name(path), leaf) for path, leaf in leaves))


def with_parameters(model: M, params: Mapping[str, jax.Array]) -> M:
    """Return the module with `params` in place of its own parameters; the names must be equal."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(model)
    names = [_name(path) for path, _ in leaves]
    missing, extra = sorted(set(names) - set(params)), sorted(set(params) - set(names))
    if missing or extra:
        raise ValueError(
            f"parameters do not fit the model: missing {missing or 'none'}; "
            f"not in the model {extra or 'none'}"
        )
    return jax.tree_util.tree_unflatten(tree, [params[name] for name in names])


def check_same(
    found: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    source: str,
    remedy: str,
) -> None:
    """Raise UserError if names or shapes of weights differ from those of the model."""
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or extra:
        raise UserError(
            f"{source}: the model differs from config.model: "
            f"missing {', '.join(missing[:6]) or 'none'}; "
            f"not in the model {', '.join(extra[:6]) or 'none'}; {remedy}"
        )
    for name, shape in wanted.items():
        if tuple(found[name]) != tuple(shape):
            raise UserError(
                f"{source}: {name} is {list(found[name])}, the model needs {list(shape)}; {remedy}"
            )


def _name(path: tuple[Any, ...]) -> str:
    # NNX stores a parameter's array under an attribute named `value`.
    parts = [str(getattr(key, "name", getattr(key, "key", key))) for key in path]
    return "/".join(part for part in parts if part != "value")
