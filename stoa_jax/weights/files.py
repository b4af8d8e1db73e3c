"""Detect and open weight files and directories, and write safetensors."""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from stoa_jax.errors import UserError
from stoa_jax.files import atomic
from stoa_jax.weights.safetensors_files import open_safetensors
from stoa_jax.weights.tensors import Tensor, TensorFile
from stoa_jax.weights.torch_files import open_torch, open_zip


def open_tensors(path: str | Path) -> TensorFile:
    """Open a safetensors, `.pt` or `.bin` file, a TorchScript archive, or a directory with one."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or directory")
    if path.is_dir():
        return _open_directory(path)
    with open(path, "rb") as f:
        start = f.read(16)
    if not start:
        raise UserError(f"{path}: the file is empty; download it again")
    if path.suffix == ".safetensors":
        found = open_safetensors(path)
    elif start[:4] == b"PK\x03\x04":
        found = open_zip(path)
    elif start[:1] == b"\x80":  # a plain pickle, torch's format before 1.6
        found = open_torch(path)
    elif path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise UserError(
            f"{path}: neither a ZIP archive nor a pickle, which torch writes; it starts with "
            f"{start[:8]!r}; download it again"
        )
    else:
        found = open_safetensors(path)
    _read_config(found, path.parent)
    return found


# Directories


def _open_directory(path: Path) -> TensorFile:
    for name in (
        "model.safetensors",
        "open_clip_model.safetensors",
        "open_clip_pytorch_model.bin",
        "pytorch_model.bin",
    ):
        if (path / name).is_file():
            found = open_tensors(path / name)
            _read_config(found, path)
            found.path = path
            return found
        index = path / f"{name}.index.json"
        if index.is_file():
            return _open_shards(path, index)
    raise UserError(
        f"{path}: contains no model.safetensors, pytorch_model.bin, open_clip_model.safetensors or "
        "their index.json; name a Hugging Face model directory, or the file itself"
    )


def _open_shards(path: Path, index: Path) -> TensorFile:
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{index}: has no weight_map; download it again")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(shards.values())):
        if not isinstance(shard, str) or PurePosixPath(shard).name != shard or shard == "..":
            name = next(n for n, s in shards.items() if s == shard)
            raise UserError(
                f"{index}: tensor {name} refers to {shard!r}, outside the directory; a shard must "
                "be a plain file name"
            )
        tensors |= open_tensors(path / shard)._tensors
    for name, shard in shards.items():
        if name not in tensors:
            raise UserError(f"{path / shard}: lacks tensor {name}, which {index.name} lists")
    found = TensorFile(path, tensors)
    _read_config(found, path)
    return found


def _read_config(found: TensorFile, directory: Path) -> None:
    for name in ("config.json", "open_clip_config.json"):
        if (directory / name).is_file():
            found.config = _read_json(directory / name)
            return


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


# Writing


def save_safetensors(
    path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write tensors in the order of their names; an interrupted write leaves no file."""
    from safetensors.numpy import save_file

    with atomic(path) as temporary:
        ordered = {name: np.asarray(x, order="C") for name, x in sorted(tensors.items())}
        save_file(ordered, temporary, metadata=dict(metadata))
