"""Fingerprints: short hashes that identify weights and preprocessing."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from stoa_jax.inference.videos import Preprocessing
from stoa_jax.models.parameters import named_parameters

if TYPE_CHECKING:
    from flax import nnx
    from numpy.typing import ArrayLike

    from stoa_jax.text import Tokenizer


def of_weights(model: "nnx.Module") -> str:
    """Return a hash of all parameters of a module, by name."""
    return of_arrays(named_parameters(model))


def of_arrays(arrays: "Mapping[str, ArrayLike]") -> str:
    """Return a hash of arrays by name, in float32."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        x = np.ascontiguousarray(arrays[name], np.float32)
        digest.update(f"{name} {x.shape}\n".encode())
        digest.update(x.data)
    return digest.hexdigest()


def of_model(weights_hash: str, tokenizer: "Tokenizer", how: Preprocessing) -> str:
    """Return the fingerprint of weights, tokenizer and preprocessing together."""
    parts = [weights_hash, tokenizer_hash(tokenizer), dataclasses.asdict(how)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def tokenizer_hash(tokenizer: "Tokenizer") -> str:
    """Return a hash of a tokenizer's vocabulary."""
    digest = hashlib.sha256(f"{tokenizer.vocab_size}\n".encode())
    digest.update(np.ascontiguousarray(tokenizer.merges, "<i4").data)
    return digest.hexdigest()
