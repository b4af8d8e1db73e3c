"""Lazily read tensors by name: the common form of all weight files."""

import dataclasses
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stoa_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file, read on demand."""

    shape: tuple[int, ...]
    file: Path
    read: Callable[[], np.ndarray]  # call at most once: tensors that torch read are released


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a file, or of all files of a directory; `config` is the JSON beside them."""

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
        """Read a tensor as float32, which represents float16 and bfloat16 exactly."""
        tensor = self._tensors[name]
        try:
            x = tensor.read()
        except UserError:
            raise
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{tensor.file}: tensor {name} cannot be read: {error}") from error
        return np.asarray(x, np.float32)

    def renamed(self, rename: Callable[[str], str]) -> "TensorFile":
        """Return the same tensors under new names."""
        found = TensorFile(
            self.path,
            {rename(name): tensor for name, tensor in self._tensors.items()},
            torchscript=self.torchscript,
        )
        found.config, found.metadata = self.config, self.metadata
        return found
