"""Read torch's files: `.pt` and `.bin` with torch, restricted to tensors; TorchScript without it.

No code in a file is ever run. Archives are read with one tensor in memory at a time.
"""

import contextlib
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np

from stoa_jax.errors import UserError
from stoa_jax.weights.tensors import Tensor, TensorFile

INSTALL_TORCH = 'pip install "torch==2.13.0"  (or: pip install "stoa-jax[torch]")'
_TORCH_TYPES = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("i1"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype(np.bool_),
}
_STORAGES = {  # their names in a pickle
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


def open_zip(path: Path) -> TensorFile:
    """Open a ZIP archive: a state dict as torch has saved it since 1.6, or a TorchScript module."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            stored = all(i.compress_type == zipfile.ZIP_STORED for i in archive.infolist())
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise UserError(f"{path}: damaged or truncated ({error}); download it again") from error
    for name in names:
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if ".." in parts or name.startswith(("/", "\\")) or (parts and ":" in parts[0]):
            raise UserError(
                f"{path}: the archive member {name!r} points outside the archive, which torch "
                "never writes; do not trust this file"
            )
    if any(name.split("/", 1)[-1] == "constants.pkl" for name in names):
        return _open_torchscript(path, names)
    if not any(name.split("/", 1)[-1] == "data.pkl" for name in names):
        raise UserError(f"{path}: a ZIP archive without data.pkl; torch did not write it")
    return open_torch(path, lazily=stored)


def open_torch(path: Path, *, lazily: bool = False) -> TensorFile:
    """Open a file with torch, restricted to tensors; `lazily` locates tensors without reading."""
    try:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError as error:
        raise UserError(
            f"{path}: reading this kind of file needs torch, which is not installed; "
            f"{INSTALL_TORCH}, or convert the file to safetensors"
        ) from error
    try:
        # Fake tensors have no data, so a large file is never in memory beside the parameters.
        with FakeTensorMode() if lazily else contextlib.nullcontext():
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        detail = str(error).split("WeightsUnpickler error:")[-1].strip().splitlines()
        raise UserError(
            f"{path}: its pickle holds more than tensors, and would run code "
            f"({detail[0][:200] if detail else 'no detail'}); it was not loaded. Save the plain "
            "state dict, or safetensors, from a source you trust"
        ) from error
    except Exception as error:  # torch raises many types of error for damaged files
        line = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise UserError(
            f"{path}: damaged or truncated ({line[0][:200]}); download it again"
        ) from error
    prefix = ""
    while isinstance(state, Mapping) and not any(
        isinstance(v, torch.Tensor) for v in state.values()
    ):
        inside = [k for k in ("model_state_dict", "state_dict", "model") if k in state]
        if not inside:
            break
        prefix, state = f"{prefix}{inside[0]}.", state[inside[0]]
    if not isinstance(state, Mapping):
        raise UserError(f"{path}: expected a state dict of tensors, found a {type(state).__name__}")
    state = dict(state)
    tensors = {}
    for name in list(state):
        if not isinstance(state[name], torch.Tensor):
            state.pop(name)
            continue
        if lazily:
            tensors[name] = _described(path, name, state[name])
            continue

        def read(name=name) -> np.ndarray:
            x = state.pop(name)
            return (x.float() if x.is_floating_point() else x).contiguous().numpy()

        tensors[name] = Tensor(tuple(state[name].shape), path, read)
    if not tensors:
        raise UserError(f"{path}: contains no tensors; is it a state dict?")
    return TensorFile(path, tensors)


def _described(path: Path, name: str, x: Any) -> Tensor:
    """Return a lazy tensor, given a fake tensor that knows its offset in the file."""
    kind = str(x.dtype).removeprefix("torch.")
    at = getattr(x.untyped_storage(), "_checkpoint_offset", None)
    if at is None or kind not in _TORCH_TYPES:
        raise UserError(f"{path}: tensor {name} of type {kind} cannot be read; save it as float32")
    size = min(x.untyped_storage().nbytes(), path.stat().st_size - at)
    return _strided(path, _TORCH_TYPES[kind], at, size, x.storage_offset(), x.shape, x.stride())


def _strided(path: Path, dtype: np.dtype, at: int, size: int, offset: int, shape, stride) -> Tensor:
    """Return a lazy tensor over `size` bytes at byte `at`; offset and stride count elements."""
    shape, stride = tuple(shape), tuple(stride)
    last = sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if all(shape) else -1
    if min((*shape, *stride, offset, 0)) < 0 or (offset + last + 1) * dtype.itemsize > size:
        raise UserError(f"{path}: a tensor {list(shape)} extends beyond its data at byte {at}")

    def read() -> np.ndarray:
        flat = np.fromfile(path, dtype, last + 1, offset=at + offset * dtype.itemsize)
        steps = [s * dtype.itemsize for s in stride]
        return np.lib.stride_tricks.as_strided(flat, shape, steps)

    return Tensor(shape, path, read)


class _Module:
    """Stand-in for any scripted module, with its attributes and no code."""

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}


class _TorchScriptUnpickler(pickle.Unpickler):
    """Unpickler that builds `_Module` and `Tensor` only, and refuses every other name."""

    def __init__(self, path: Path, file, storages: dict[str, tuple[int, int]]):
        super().__init__(file)
        self._path, self._storages = path, storages

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if module == "torch" and name in _STORAGES:
            return name
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch.jit._pickle" and name.startswith(("build_", "restore_type_tag")):
            return lambda value, *_: value
        if (module, name) == ("torch", "device"):
            return lambda *_: None
        raise UserError(
            f"{self._path}: its pickle refers to {module}.{name}, which is not a tensor; it was "
            "not loaded. Do not trust this file"
        )

    def persistent_load(self, pid: Any) -> tuple[np.dtype, str]:
        kind, storage, key = pid[0], pid[1], pid[2]
        if kind != "storage" or storage not in _STORAGES:
            raise UserError(f"{self._path}: unknown tensor storage {pid[:3]!r}")
        return _TORCH_TYPES[_STORAGES[storage]], str(key)

    def _tensor(self, storage, offset, shape, stride, *_) -> Tensor:
        dtype, key = storage
        if key not in self._storages:
            raise UserError(
                f"{self._path}: tensor data {key!r} is missing; download the file again"
            )
        return _strided(self._path, dtype, *self._storages[key], offset, shape, stride)


def _open_torchscript(path: Path, names: list[str]) -> TensorFile:
    """Open the tensors of a scripted module, named by the path of attributes to each."""
    (root,) = {name.split("/", 1)[0] for name in names if name.endswith("/constants.pkl")}
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as raw:
            storages = {}
            for info in archive.infolist():
                parts = info.filename.split("/")
                if parts[:2] != [root, "data"] or len(parts) != 3:
                    continue
                if info.compress_type != zipfile.ZIP_STORED:
                    raise UserError(
                        f"{path}: archive member {info.filename} is compressed, which torch "
                        "never does; download the file again"
                    )
                raw.seek(info.header_offset)
                local = raw.read(30)
                name_size, extra_size = struct.unpack("<HH", local[26:30])
                start = info.header_offset + 30 + name_size + extra_size
                storages[parts[2]] = start, info.file_size
            with archive.open(f"{root}/data.pkl") as pickled:
                module = _TorchScriptUnpickler(path, pickled, storages).load()
        tensors: dict[str, Tensor] = {}
        _collect(module, "", tensors)
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise any type of error
        line = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{path}: damaged TorchScript archive ({line}); download it again"
        ) from error
    if not tensors:
        raise UserError(f"{path}: this TorchScript archive contains no tensors")
    return TensorFile(path, tensors, torchscript=True)


def _collect(node: Any, prefix: str, tensors: dict[str, Tensor]) -> None:
    for name, value in node.state.items() if isinstance(node, _Module) else ():
        if isinstance(value, Tensor):
            tensors[f"{prefix}{name}"] = value
        elif isinstance(value, _Module):
            _collect(value, f"{prefix}{name}.", tensors)
