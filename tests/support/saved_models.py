"""Write models to directories that `stoa_jax.load` opens."""

import dataclasses
import json

import numpy as np

from stoa_jax import weights
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.parameters import named_parameters
from stoa_jax.weights.files import save_safetensors


def shallow(**changes):
    """Return `tiny` with one layer in each encoder after vision, which compiles sooner."""
    one = dict.fromkeys(("text_depth", "fusion_depth", "trajectory_depth", "action_depth"), 1)
    return dataclasses.replace(ModelConfig.tiny(), **{**one, **changes})


def write_network(folder, network, answers=()):
    """Write a network in the format of `stoa_jax.load`."""
    params = {name: np.asarray(x) for name, x in named_parameters(network).items()}
    return write_parameters(folder, network.config, params, answers)


def write_parameters(folder, config, params, answers=()):
    """Write parameters by name in the format of `stoa_jax.load`."""
    folder.mkdir(parents=True)
    note = {weights.METADATA: json.dumps(dataclasses.asdict(config))}
    save_safetensors(folder / "model.safetensors", params, note)
    if answers:
        (folder / "answers.json").write_text(json.dumps(list(answers)))
    return folder


def write_random(folder, config, seed=0, answers=()):
    """Write random weights, sampled by NumPy because initialising a network takes seconds."""
    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in sorted(weights.parameter_shapes(config).items()):
        center = 1.0 if name.endswith("scale") else 0.0
        params[name] = (center + 0.03 * rng.standard_normal(shape)).astype(np.float32)
    return write_parameters(folder, config, params, answers)
