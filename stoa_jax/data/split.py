"""A split of a built data set: its records by index, and the metadata of its clips.

`open_split` opens it by name; `pipeline` makes batches of it.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stoa_jax.data import records
from stoa_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Metadata:
    """A clip's id, texts and answers, without its frames."""

    video_id: str
    texts: tuple[str, ...]
    answers: tuple[str, ...]


class Split:
    """One split of a built data set, by index. It opens its files on first use; pickling works."""

    def __init__(self, directory: Path, dataset: str, split: str):
        self.directory, self.dataset, self.split = Path(directory), dataset, split
        import tensorflow_datasets as tfds

        self._info = tfds.builder_from_directory(self.directory).info
        features: Any = self._info.features
        frames, objects, _ = features["boxes"].shape
        self.frames, self.objects = frames, objects
        self.class_names = records.read_class_names(self.directory)

    def __len__(self) -> int:
        return self._info.splits[self.split].num_examples

    def __getstate__(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in ("directory", "dataset", "split")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    @functools.cached_property
    def _source(self):
        import tensorflow_datasets as tfds

        builder: Any = tfds.builder_from_directory(self.directory)
        return builder.as_data_source(self.split)

    @functools.cached_property
    def _listed(self) -> list[Metadata]:
        listed = list(read_metadata(self.directory, self.split))
        if not listed:  # `tfds build` writes no lists
            listed = [metadata_of(self.read(i)) for i in range(len(self))]
        if len(listed) != len(self):
            raise UserError(
                f"{self.directory}/clips lists {len(listed)} clips of {self.split!r} instead of "
                f"{len(self)}; build again with --overwrite"
            )
        return listed

    def read(self, i: int) -> dict[str, Any]:
        """Return record i as stored: arrays, JPEG bytes, UTF-8 bytes."""
        return self._source[i]

    def metadata(self, i: int) -> Metadata:
        """Return id, texts and answers of clip i without opening its frames."""
        return self._listed[i]

    def tokens(
        self, i: int, length: int = records.TEXT_LENGTH, vocab_size: int = records.END + 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens [n, length] int32 and tags [n, length] int8 of all texts of clip i."""
        record = self.read(i)
        return fit_tokens(record["tokens"], record["tags"], length, vocab_size)

    @functools.cached_property
    def kind(self) -> records.Kind:
        """Kind of the texts: captions, questions or options."""
        first = metadata_of(self.read(0))
        return records.kind_of(first.texts, first.answers)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of all ids, texts and answers, in order."""
        path = self.directory / "build.json"
        if path.exists():
            return json.loads(path.read_text())["fingerprints"][self.split]
        return fingerprint(self._listed)

    @functools.cached_property
    def stored_size(self) -> tuple[int, int]:
        """(height, width) of the first clip's frames."""
        return records.decode_jpeg(self.read(0)["frames"][0]).shape[:2]


def metadata_of(record: Mapping[str, Any]) -> Metadata:
    """Return the metadata of a stored record."""
    texts, answers = ([t.decode() for t in record[k]] for k in ("texts", "answers"))
    return Metadata(record["video_id"].decode(), tuple(texts), tuple(answers))


def read_metadata(directory: Path, split: str) -> Iterator[Metadata]:
    """Yield the clips of a split from the lists that the build writes beside its shards."""
    for path in sorted((directory / "clips").glob(f"{split}-{'[0-9]' * 5}-of-*.jsonl")):
        with open(path, encoding="utf-8") as file:
            next(file)  # the line about the shard
            for line in file:
                row = json.loads(line)
                yield Metadata(row["video_id"], tuple(row["texts"]), tuple(row["answers"]))


def fingerprint(clips: Iterable[Metadata]) -> str:
    """Hash `Metadata` rows; splits with equal hashes hold the same clips and texts."""
    digest = hashlib.sha256()
    for clip in clips:
        row = [clip.video_id, list(clip.texts), list(clip.answers)]
        digest.update(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
    return digest.hexdigest()[:16]


def open_split(data_dir: str | os.PathLike[str], dataset: str, split: str) -> Split:
    """Open a split of a data set that `stoa_jax.data.build` or `tfds build` made in `data_dir`."""
    directory = dataset_directory(data_dir, dataset)
    if directory is None:
        option = "" if dataset.startswith("synthetic/") else " --manual-dir=DIR"
        raise UserError(
            f"data set {dataset!r} is not in {data_dir}; build it: "
            f"python -m stoa_jax.data.build {dataset}{option} --data-dir={data_dir}"
        )
    import tensorflow_datasets as tfds

    try:
        splits = tfds.builder_from_directory(directory).info.splits
    except Exception as error:  # TFDS, protobuf and JSON have different exceptions
        raise UserError(
            f"{directory}: unreadable data set ({one_line(error)}); build again"
        ) from None
    if split not in splits:
        raise UserError(f"{dataset} has no split {split!r}; it has {', '.join(sorted(splits))}")
    if not splits[split].num_examples:
        raise UserError(f"{dataset}: the split {split!r} holds no clips; see failures.jsonl there")
    return Split(directory, dataset, split)


def dataset_directory(data_dir: str | os.PathLike[str], dataset: str) -> Path | None:
    """Return the directory of a data set's newest version, or None if it was not built."""
    root = Path(data_dir).expanduser() / dataset
    found = [path.parent for path in root.glob("*/dataset_info.json") if _version(path.parent)]
    return max(found, key=_version) if found else None


def _version(path: Path) -> tuple[int, ...]:
    parts = path.name.split(".")
    return tuple(map(int, parts)) if all(p.isdigit() for p in parts) else ()


def one_line(error: Exception) -> str:
    """Format an exception as part of a one-line message."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def fit_tokens(
    tokens: np.ndarray, tags: np.ndarray, length: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Fit stored tokens [n, 77] to a vocabulary and a length, keeping the end token."""
    if vocab_size <= records.END:
        from stoa_jax import text

        tokens, tags = text.restrict(tokens, tags, vocab_size)
    tokens = np.array(tokens[:, :length], np.int32)
    tags = np.array(tags[:, :length], np.int8)
    cut = ~(tokens == vocab_size - 1).any(1)
    tokens[cut, -1] = vocab_size - 1
    tags[cut, -1] = 0
    return tokens, tags
