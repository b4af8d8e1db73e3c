"""Save models to directories from which `stoa_jax.load` restores the same numbers."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from stoa_jax import weights
from stoa_jax.errors import UserError
from stoa_jax.files import atomic_directory
from stoa_jax.inference import card, sidecars
from stoa_jax.inference.opened import Opened
from stoa_jax.models.parameters import named_parameters
from stoa_jax.text import Tokenizer
from stoa_jax.weights import files
from stoa_jax.weights.hugging_face import save_hugging_face


def save(model: Opened, out: Path) -> None:
    """Write a model to a new directory, atomically."""
    if out.exists():
        raise UserError(f"{out}: already exists; name a new directory")
    with atomic_directory(out) as folder:
        write_files(model, folder)


def write_files(model: Opened, folder: Path) -> None:
    """Write weights, tokenizer, sidecars and card into a directory."""
    if model.network is None:
        raise UserError(f"save: {model.source} is an export; copy its directory instead")
    c = model.config
    params = {name: np.asarray(x) for name, x in named_parameters(model.network).items()}
    if model.whole is None:
        save_hugging_face(folder / "clip", params, c)
        for path in (folder / "clip").iterdir():
            path.rename(folder / path.name)
        (folder / "clip").rmdir()
    else:
        note = json.dumps(dataclasses.asdict(dataclasses.replace(c, dtype="float32")))
        files.save_safetensors(folder / "model.safetensors", params, {weights.METADATA: note})
    if not np.array_equal(model.tokenizer.merges, Tokenizer(c.vocab_size).merges):
        (folder / "tokenizer.json").write_text(json.dumps(_tokenizer_json(model.tokenizer)))
    if model.answers:
        sidecars.write(folder, sidecars.ANSWERS, list(model.answers))
    if model.calibration is not None:
        sidecars.write(folder, sidecars.CALIBRATION, dict(model.calibration.record))
    settings = {"frames": model.frames, "untrained": sorted(model.untrained)}
    sidecars.write(folder, sidecars.SETTINGS, settings)
    if model.record:
        sidecars.write(folder, sidecars.RUN, dict(model.record))
    (folder / "README.md").write_text(card.model_card(model), encoding="utf-8")


def _tokenizer_json(tokenizer: Tokenizer) -> dict:
    """Return a vocabulary of CLIP's layout in the format of Hugging Face's tokenizer.json."""
    from stoa_jax.text.bpe import BASE, BYTES

    return {"model": {"type": "BPE", **_pieces(tokenizer, BASE, BYTES)}}


def _pieces(tokenizer: Tokenizer, base: int, order: list[int]) -> dict:
    # The readable stand-ins of unprintable bytes follow Latin-1, as in GPT-2.
    symbols = [chr(b if i < 188 else 256 + i - 188) for i, b in enumerate(order)]
    names = symbols + [s + "</w>" for s in symbols]
    merges = []
    for left, right in tokenizer.merges.tolist():
        merges.append(f"{names[left]} {names[right]}")
        names.append(names[left] + names[right])
    vocab = {name: i for i, name in enumerate(names)}
    vocab |= {"<|startoftext|>": len(names), "<|endoftext|>": len(names) + 1}
    return {"vocab": vocab, "merges": merges}
