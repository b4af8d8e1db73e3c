"""Models written as directories that `stoa_jax.load` opens."""

import dataclasses
import json

import numpy as np
from flax import nnx

from stoa_jax import weights
from stoa_jax.models.parameters import named_parameters
from stoa_jax.models.stoa import Stoa
from stoa_jax.weights.files import save_safetensors


def write_network(folder, network, answers=()):
    """Write a network as `stoa_jax.load` reads it."""
    folder.mkdir(parents=True)
    params = {name: np.asarray(x) for name, x in named_parameters(network).items()}
    note = {weights.METADATA: json.dumps(dataclasses.asdict(network.config))}
    save_safetensors(folder / "model.safetensors", params, note)
    if answers:
        (folder / "answers.json").write_text(json.dumps(list(answers)))
    return folder


def write_random(folder, config, seed=0, answers=()):
    """Write a network of random weights."""
    return write_network(folder, Stoa(config, rngs=nnx.Rngs(seed)), answers)
