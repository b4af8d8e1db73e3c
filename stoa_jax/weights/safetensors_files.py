"""Read safetensors files with one tensor in memory at a time."""

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from stoa_jax.errors import UserError
from stoa_jax.weights.tensors import Tensor, TensorFile

_TYPES = {
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


def open_safetensors(path: Path) -> TensorFile:
    """Open the tensors that the header lists, after checking that all their bytes are there."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        head = f.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        if not 2 <= length <= min(size - 8, 100 << 20):
            raise UserError(
                f"{path}: not a safetensors file, or truncated: its header would have {length} "
                f"bytes, the file has {size}; download it again"
            )
        try:
            header = json.loads(f.read(length))
            metadata = header.pop("__metadata__", {})
            entries = {name: _entry(entry) for name, entry in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path}: damaged safetensors header: {error}") from error
    tensors = {}
    for name, (dtype, shape, start, stop) in entries.items():
        if stop - start != dtype.itemsize * int(np.prod(shape, dtype=np.int64)) or start < 0:
            raise UserError(
                f"{path}: tensor {name} has {stop - start} bytes, which does not match {dtype} "
                f"{shape}; the header is damaged, download the file again"
            )
        if 8 + length + stop > size:
            raise UserError(
                f"{path}: truncated: tensor {name} ends at byte {8 + length + stop}, the file at "
                f"{size}; download it again"
            )

        def read(dtype=dtype, shape=shape, at=8 + length + start) -> np.ndarray:
            # Not memory-mapped, because mapped pages would count as memory of the process.
            count = int(np.prod(shape, dtype=np.int64))
            return np.fromfile(path, dtype, count, offset=at).reshape(shape)

        tensors[name] = Tensor(shape, path, read)
    found = TensorFile(path, tensors)
    found.metadata = metadata
    return found


def _entry(entry: dict[str, Any]) -> tuple[np.dtype, tuple[int, ...], int, int]:
    if entry["dtype"] not in _TYPES:
        raise ValueError(f"type {entry['dtype']!r} is not one of {', '.join(_TYPES)}")
    start, stop = entry["data_offsets"]
    return _TYPES[entry["dtype"]], tuple(map(int, entry["shape"])), int(start), int(stop)
