"""A model's parameters by name: the one view that optimizer, checkpoints and converters share."""

from collections.abc import Mapping
from typing import TypeVar

import jax

M = TypeVar("M")


def named_parameters(model) -> dict[str, jax.Array]:
    """`{"visual/blocks/mlp/up/kernel": array, …}` of a module, an abstract one too, sorted."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    return dict(sorted((_name(path), leaf) for path, leaf in leaves))


def with_parameters(model: M, params: Mapping[str, jax.Array]) -> M:
    """The module with these parameters in place of its own; the names must be the same."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(model)
    names = [_name(path) for path, _ in leaves]
    missing, extra = sorted(set(names) - set(params)), sorted(set(params) - set(names))
    if missing or extra:
        raise ValueError(
            f"parameters do not fit the model: missing {missing or 'none'}; "
            f"not the model's {extra or 'none'}"
        )
    return jax.tree_util.tree_unflatten(tree, [params[name] for name in names])


def _name(path) -> str:
    # NNX puts a parameter's array under an attribute `value` of its own.
    parts = [str(getattr(key, "name", getattr(key, "key", key))) for key in path]
    return "/".join(part for part in parts if part != "value")
