"""Our parameters as the twin's, and the twin's gradients as ours.

A stack of blocks is one array with a leading depth axis in ours, and a list in the twin.
"""

import re
from collections.abc import Mapping

import numpy as np
import torch

from benchmarks.twin.model import Twin

# (ending of our name, ending of the twin's); the first match applies.
NAMES = (
    ("attention/qkv/kernel", "qkv.weight"),
    ("attention/qkv/bias", "qkv.bias"),
    ("attention/out/kernel", "out.weight"),
    ("attention/out/bias", "out.bias"),
    ("blocks/mlp/up/kernel", "blocks.up.weight"),
    ("blocks/mlp/up/bias", "blocks.up.bias"),
    ("blocks/mlp/down/kernel", "blocks.down.weight"),
    ("blocks/mlp/down/bias", "blocks.down.bias"),
    ("kernel", "weight"),
    ("scale", "weight"),
    ("bias", "bias"),
)


def twin_name(name: str) -> str:
    """Return the twin's name of one of our parameters, without the number of a block."""
    if name not in ("logit_scale", "fusion/lm_bias"):
        for ours, theirs in NAMES:
            if name.endswith(ours):
                name = name.removesuffix(ours) + theirs
                break
    return name.replace("/", ".")


def twin_array(name: str, x: np.ndarray) -> np.ndarray:
    """Return one of our parameters, of a single block, in the twin's layout."""
    if name.endswith("attention/out/kernel"):  # [H, D, h]
        x = x.reshape(-1, x.shape[-1])
    elif name.endswith("patch/kernel"):  # [size, size, 3, h]
        x = x.reshape(-1, x.shape[-1])
    elif name.endswith("qkv/kernel"):  # [h, 3, H, D]
        x = x.reshape(x.shape[0], -1)
    elif name.endswith("qkv/bias"):
        x = x.reshape(-1)
    return x.T if name.endswith("kernel") else x


def our_array(name: str, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return a parameter or gradient of the twin in our layout."""
    return (x.T if name.endswith("kernel") else x).reshape(shape)


def load(model: Twin, params: Mapping[str, np.ndarray]) -> None:
    """Copy our parameters into the twin; none of either may be left over."""
    state = {}
    for name, value in params.items():
        theirs, value = twin_name(name), np.asarray(value)
        if "/blocks/" not in name:
            state[theirs] = twin_array(name, value)
            continue
        for i, one in enumerate(value):
            state[theirs.replace(".blocks.", f".blocks.{i}.")] = twin_array(name, one)
    # Copies, because JAX hands out arrays that cannot be written to.
    model.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in state.items()}, strict=True)


def gradients(model: Twin, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the twin's gradients under our names; `params` gives names and shapes."""
    grads = {k: p.grad.float().cpu().numpy() for k, p in model.named_parameters()}
    found = {}
    for name, value in params.items():
        theirs, shape = twin_name(name), value.shape
        if "/blocks/" not in name:
            found[name] = our_array(name, grads[theirs], shape)
            continue
        each = (grads[theirs.replace(".blocks.", f".blocks.{i}.")] for i in range(shape[0]))
        found[name] = np.stack([our_array(name, one, shape[1:]) for one in each])
    return found


def our_names(model: Twin, params: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Return our name of every parameter of the twin."""
    table = {twin_name(name): name for name in params}
    return {
        k: table[re.sub(r"\.blocks\.\d+\.", ".blocks.", k)] for k, _ in model.named_parameters()
    }
