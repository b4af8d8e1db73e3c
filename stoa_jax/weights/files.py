"""Tensors out of weight files: by name, as float32, without running anything a file holds.

safetensors and TorchScript archives are taken apart here, `.pt` and `.bin` by torch, restricted to
tensors; either way one tensor is in memory at a time.
"""

import contextlib
import dataclasses
import json
import os
import pickle
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np

from stoa_jax.errors import UserError

INSTALL_TORCH = 'pip install "torch==2.13.0"  (or: pip install "stoa-jax[torch]")'
_SAFETENSORS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
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


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file, not read yet."""

    shape: tuple[int, ...]
    file: Path
    read: Callable[[], np.ndarray]  # at most once: what torch read is given back then


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a file or of a directory's files; `config` is the JSON beside them."""

    def __init__(self, path: Path, tensors: dict[str, Tensor], *, torchscript: bool = False):
        self.path, self._tensors = path, tensors
        self.torchscript = torchscript
        self.config: dict[str, Any] = {}
        self.metadata: dict[str, str] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def take(self, name: str) -> np.ndarray:
        """The tensor as float32; float16 and bfloat16 are exact in it."""
        tensor = self._tensors[name]
        try:
            x = tensor.read()
        except UserError:
            raise
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{tensor.file}: tensor {name} cannot be read: {error}") from error
        return np.asarray(x, np.float32)

    def renamed(self, rename: Callable[[str], str]) -> "TensorFile":
        """The same tensors under other names."""
        found = TensorFile(
            self.path,
            {rename(name): tensor for name, tensor in self._tensors.items()},
            torchscript=self.torchscript,
        )
        found.config, found.metadata = self.config, self.metadata
        return found


def open_tensors(path: str | Path) -> TensorFile:
    """A safetensors, `.pt` or `.bin` file, a TorchScript archive, or a directory that holds one."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or directory")
    if path.is_dir():
        return _open_directory(path)
    with open(path, "rb") as f:
        start = f.read(16)
    if not start:
        raise UserError(f"{path}: the file is empty; fetch it again")
    if path.suffix == ".safetensors":
        found = _open_safetensors(path)
    elif start[:4] == b"PK\x03\x04":
        found = _open_zip(path)
    elif start[:1] == b"\x80":  # a bare pickle, torch's format before 1.6
        found = _open_torch(path)
    elif path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise UserError(
            f"{path}: neither a ZIP archive nor a pickle, as torch writes; it begins with "
            f"{start[:8]!r}; fetch it again"
        )
    else:
        found = _open_safetensors(path)
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
        f"{path}: no model.safetensors, pytorch_model.bin, open_clip_model.safetensors or their "
        "index.json in it; name a Hugging Face model directory, or the file itself"
    )


def _open_shards(path: Path, index: Path) -> TensorFile:
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{index}: no weight_map in it; fetch it again")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(shards.values())):
        if not isinstance(shard, str) or PurePosixPath(shard).name != shard or shard == "..":
            name = next(n for n, s in shards.items() if s == shard)
            raise UserError(
                f"{index}: tensor {name} is said to lie in {shard!r}, outside the directory; "
                "shards are plain file names"
            )
        tensors |= open_tensors(path / shard)._tensors
    for name, shard in shards.items():
        if name not in tensors:
            raise UserError(f"{path / shard}: tensor {name} is missing, which {index.name} names")
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
        raise UserError(f"{path}: a JSON object is expected, it holds a {type(value).__name__}")
    return value


# safetensors


def _open_safetensors(path: Path) -> TensorFile:
    size = path.stat().st_size
    with open(path, "rb") as f:
        head = f.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        if not 2 <= length <= min(size - 8, 100 << 20):
            raise UserError(
                f"{path}: not a safetensors file, or cut off: its header would have {length} "
                f"bytes, the file has {size}; fetch it again"
            )
        try:
            header = json.loads(f.read(length))
            metadata = header.pop("__metadata__", {})
            entries = {name: _safetensors_entry(entry) for name, entry in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path}: damaged safetensors header: {error}") from error
    tensors = {}
    for name, (dtype, shape, start, stop) in entries.items():
        if stop - start != dtype.itemsize * int(np.prod(shape, dtype=np.int64)) or start < 0:
            raise UserError(
                f"{path}: tensor {name} has {stop - start} bytes, {dtype} {shape} needs another "
                "number; the header is damaged"
            )
        if 8 + length + stop > size:
            raise UserError(
                f"{path}: tensor {name} ends at byte {8 + length + stop}, the file at {size}; it "
                "is cut off, fetch it again"
            )

        def read(dtype=dtype, shape=shape, at=8 + length + start) -> np.ndarray:
            # Not mapped into memory: mapped pages would count as the process's own.
            count = int(np.prod(shape, dtype=np.int64))
            return np.fromfile(path, dtype, count, offset=at).reshape(shape)

        tensors[name] = Tensor(shape, path, read)
    found = TensorFile(path, tensors)
    found.metadata = metadata
    return found


def _safetensors_entry(entry: dict[str, Any]) -> tuple[np.dtype, tuple[int, ...], int, int]:
    if entry["dtype"] not in _SAFETENSORS:
        raise ValueError(f"type {entry['dtype']!r} is not one of {', '.join(_SAFETENSORS)}")
    start, stop = entry["data_offsets"]
    return _SAFETENSORS[entry["dtype"]], tuple(map(int, entry["shape"])), int(start), int(stop)


# What torch writes


def _open_zip(path: Path) -> TensorFile:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            stored = all(i.compress_type == zipfile.ZIP_STORED for i in archive.infolist())
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise UserError(f"{path}: damaged or cut off ({error}); fetch it again") from error
    for name in names:
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if ".." in parts or name.startswith(("/", "\\")) or (parts and ":" in parts[0]):
            raise UserError(
                f"{path}: its member {name!r} climbs out of the archive; torch writes none such, "
                "do not trust this file"
            )
    if any(name.split("/", 1)[-1] == "constants.pkl" for name in names):
        return _open_torchscript(path, names)
    if not any(name.split("/", 1)[-1] == "data.pkl" for name in names):
        raise UserError(f"{path}: a ZIP archive without data.pkl; torch did not write it")
    return _open_torch(path, lazily=stored)


def _open_torch(path: Path, *, lazily: bool = False) -> TensorFile:
    """By torch, restricted to tensors; `lazily` it says where each lies, and none is read yet."""
    try:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError as error:
        raise UserError(
            f"{path}: files of this kind are read by torch, which is not installed; "
            f"{INSTALL_TORCH}, or convert the file to safetensors"
        ) from error
    try:
        # A fake tensor is only described: a large file is not in memory beside the parameters.
        with FakeTensorMode() if lazily else contextlib.nullcontext():
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        detail = str(error).split("WeightsUnpickler error:")[-1].strip().splitlines()
        raise UserError(
            f"{path}: its pickle wants more than tensors, and would run code "
            f"({detail[0][:200] if detail else 'no detail'}); it was not loaded. Save the plain "
            "state dict, or safetensors, from a source you trust"
        ) from error
    except Exception as error:  # torch has a zoo of errors for damaged files
        line = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise UserError(f"{path}: damaged or cut off ({line[0][:200]}); fetch it again") from error
    prefix = ""
    while isinstance(state, Mapping) and not any(
        isinstance(v, torch.Tensor) for v in state.values()
    ):
        inside = [k for k in ("model_state_dict", "state_dict", "model") if k in state]
        if not inside:
            break
        prefix, state = f"{prefix}{inside[0]}.", state[inside[0]]
    if not isinstance(state, Mapping):
        raise UserError(
            f"{path}: a {type(state).__name__} where a state dict of tensors is expected"
        )
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
        raise UserError(f"{path}: no tensors in it; is it a state dict?")
    return TensorFile(path, tensors)


def _described(path: Path, name: str, x: Any) -> Tensor:
    """A tensor from where torch says that its data lies in the file."""
    kind = str(x.dtype).removeprefix("torch.")
    at = getattr(x.untyped_storage(), "_checkpoint_offset", None)
    if at is None or kind not in _TORCH_TYPES:
        raise UserError(f"{path}: tensor {name} of type {kind} cannot be read; save it as float32")
    size = min(x.untyped_storage().nbytes(), path.stat().st_size - at)
    return _strided(path, _TORCH_TYPES[kind], at, size, x.storage_offset(), x.shape, x.stride())


def _strided(path: Path, dtype: np.dtype, at: int, size: int, offset: int, shape, stride) -> Tensor:
    """A tensor in `size` bytes of data at byte `at`, with an offset and strides in elements."""
    shape, stride = tuple(shape), tuple(stride)
    last = sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if all(shape) else -1
    if min((*shape, *stride, offset, 0)) < 0 or (offset + last + 1) * dtype.itemsize > size:
        raise UserError(f"{path}: a tensor {list(shape)} reaches outside its data at byte {at}")

    def read() -> np.ndarray:
        flat = np.fromfile(path, dtype, last + 1, offset=at + offset * dtype.itemsize)
        steps = [s * dtype.itemsize for s in stride]
        return np.lib.stride_tricks.as_strided(flat, shape, steps)

    return Tensor(shape, path, read)


class _Module:
    """Stands for any scripted module: its attributes, and nothing that runs."""

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}


class _TorchScriptUnpickler(pickle.Unpickler):
    """Modules become `_Module`, tensors `Tensor`; every other name is refused."""

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
            f"{self._path}: its pickle asks for {module}.{name}, which is not a tensor; it was "
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
            raise UserError(f"{self._path}: tensor data {key!r} is missing; fetch the file again")
        return _strided(self._path, dtype, *self._storages[key], offset, shape, stride)


def _open_torchscript(path: Path, names: list[str]) -> TensorFile:
    """The tensors of a scripted module, by the path of attributes that leads to each."""
    (root,) = {name.split("/", 1)[0] for name in names if name.endswith("/constants.pkl")}
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as raw:
            storages = {}
            for info in archive.infolist():
                parts = info.filename.split("/")
                if parts[:2] != [root, "data"] or len(parts) != 3:
                    continue
                if info.compress_type != zipfile.ZIP_STORED:
                    raise UserError(f"{path}: member {info.filename} is compressed; torch does not")
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
    except Exception as error:  # a damaged pickle fails in any way there is
        line = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: damaged TorchScript archive ({line}); fetch it again") from error
    if not tensors:
        raise UserError(f"{path}: a TorchScript archive without tensors")
    return TensorFile(path, tensors, torchscript=True)


def _collect(node: Any, prefix: str, tensors: dict[str, Tensor]) -> None:
    for name, value in node.state.items() if isinstance(node, _Module) else ():
        if isinstance(value, Tensor):
            tensors[f"{prefix}{name}"] = value
        elif isinstance(value, _Module):
            _collect(value, f"{prefix}{name}.", tensors)


# Writing


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path`, moved there only if all went well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_safetensors(
    path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Tensors by name, sorted; the file is there whole or not at all."""
    from safetensors.numpy import save_file

    with written_whole(path) as temporary:
        ordered = {name: np.asarray(x, order="C") for name, x in sorted(tensors.items())}
        save_file(ordered, temporary, metadata=dict(metadata))
