"""Renamed configuration keys and parameters, so that files of older versions still load.

Add an entry here whenever a key of the configuration, a field of `ModelConfig` or a parameter is
renamed or removed.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

# Old dotted key → new dotted key; None: the key was removed and its value no longer matters.
CONFIG_KEYS: dict[str, str | None] = {
    "init.anew": "init.reinit",
    "loss.target": "model.alignment_target",
}

# Parameters that no longer exist; values that an older version saved for them are ignored.
REMOVED_PARAMETERS = ("fusion/mask_input",)

# Regex over the whole old parameter name → replacement, as in `re.sub`; the first match applies.
PARAMETERS: dict[str, str] = {}


def new_key(key: str) -> str | None:
    """Return the current name of a dotted configuration key; None if the key was removed."""
    return CONFIG_KEYS.get(key, key)


def migrate_flat_config(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `{"train.steps": 1000, …}` mapping with current keys."""
    return {new: value for key, value in flat.items() if (new := new_key(key)) is not None}


def migrate_model_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the saved fields of a `ModelConfig` under their current names."""
    flat = migrate_flat_config({f"model.{name}": value for name, value in fields.items()})
    return {key.removeprefix("model."): value for key, value in flat.items()}


def migrate_parameter_name(name: str) -> str:
    """Return the current name of a parameter."""
    for old, new in PARAMETERS.items():
        renamed, count = re.subn(f"^(?:{old})$", new, name)
        if count:
            return renamed
    return name


def parameter_renames(names: Iterable[str]) -> dict[str, str]:
    """Return `{old: new}` for those of `names` that were renamed."""
    return {name: new for name in names if (new := migrate_parameter_name(name)) != name}


def migrate_parameters(
    params: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Return an older version's parameters in the current layout, for a model of these shapes.

    The fusion encoder's position table has become two parameters: the rows that come from CLIP, and
    the others.
    """
    found = {name: x for name, x in params.items() if name not in REMOVED_PARAMETERS}
    table, more = "fusion/positions", "fusion/more_positions"
    if table in found and more in shapes and more not in found:
        rows = shapes[table][0]
        found[table], found[more] = found[table][:rows], found[table][rows:]
    return found
