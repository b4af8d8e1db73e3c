"""Shards of a data set being built: their contents, their state, and how they are written.

A shard is two files: the records, and `clips/<shard>.jsonl` with a line about the shard and one for
each of its clips (id, texts, answers). The second is written last and marks the shard as finished.
When failed clips are retried, it is renamed to `<shard>.jsonl.before` until the shard is rewritten.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from stoa_jax import files
from stoa_jax.data.build import workers
from stoa_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Shard:
    """A contiguous range of a split's entries, determined by their order alone."""

    split: str
    index: int
    count: int  # shards of the split
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Name as in `train-00003-of-00010`."""
        return f"{self.split}-{self.index:05d}-of-{self.count:05d}"


def shards_of(split: str, entries: int) -> list[Shard]:
    """Divide a split into at most 64 shards of at least 16 clips, or into more shards of 1024."""
    size = min(1024, max(16, -(-entries // 64)))
    count = -(-entries // size)
    return [Shard(split, i, count, i * size, min(entries, (i + 1) * size)) for i in range(count)]


@dataclasses.dataclass(frozen=True)
class Part:
    """A shard with its entries, whose files are in `root`."""

    shard: Shard
    entries: Sequence[Any]
    root: str


def file_of(directory: Path, dataset: str, shard: Shard) -> Path:
    """Return the path of the shard's records."""
    return directory / (
        f"{dataset.partition('/')[0]}-{shard.split}.array_record-"
        f"{shard.index:05d}-of-{shard.count:05d}"
    )


def list_of(directory: Path, shard: Shard) -> Path:
    """Return the path of the lines about the shard and its clips."""
    return directory / "clips" / f"{shard.name}.jsonl"


def is_done(directory: Path, dataset: str, shard: Shard) -> bool:
    """Return whether a shard is finished: the list of its clips is written last."""
    header = header_of(list_of(directory, shard))
    return header is not None and _is_whole(file_of(directory, dataset, shard), header)


def _is_whole(file: Path, header: dict[str, Any]) -> bool:
    return file.exists() and file.stat().st_size == header["file_bytes"]


def header_of(path: Path) -> dict[str, Any] | None:
    """Return the line about a shard, or None if it is missing or torn."""
    try:
        with open(path) as file:
            return json.loads(file.readline())
    except (OSError, ValueError):
        return None


def write(
    directory: Path,
    dataset: str,
    shard: Shard,
    results: Sequence[workers.Result],
    names: Sequence[str],
) -> None:
    """Write a shard to a temporary file, move it into place, and write the list of its clips."""
    path = file_of(directory, dataset, shard)
    failures, rows, size = [], [], 0
    with _writing(path), files.atomic(path) as temporary:
        writer = array_record_module.ArrayRecordWriter(os.fspath(temporary), "group_size:1")
        try:
            for place, (result, video) in enumerate(zip(results, names, strict=True)):
                clip = {"place": place, "video": video}
                failures += [{**clip, "error": e} for e in result.dropped]
                if result.error:
                    failures.append({**clip, "error": result.error, "clip": True})
                    continue
                writer.write(result.record)
                rows.append({**result.metadata, "objects": result.objects})
                size += len(result.record)
        finally:
            writer.close()
    header = {
        "clips": len(rows),
        "bytes": size,
        "file_bytes": path.stat().st_size,
        "objects": sum(r.objects for r in results),
        "failures": failures,
    }
    lines = [json.dumps(row, ensure_ascii=False) for row in [header, *rows]]
    write_text(list_of(directory, shard), "\n".join(lines) + "\n")
    _before(list_of(directory, shard)).unlink(missing_ok=True)


def set_aside(directory: Path) -> None:
    """Mark shards with failed clips as unfinished; their built clips become `kept`."""
    for path in (directory / "clips").glob("*.jsonl"):
        header = header_of(path) or {"failures": ()}
        if any("clip" in failure for failure in header["failures"]):
            path.rename(_before(path))


def _before(path: Path) -> Path:
    return path.with_name(f"{path.name}.before")


def kept(directory: Path, dataset: str, shard: Shard) -> list[int]:
    """Return the indices of the clips of a shard set aside that need not be encoded again."""
    header = header_of(_before(list_of(directory, shard)))
    if header is None or not _is_whole(file_of(directory, dataset, shard), header):
        return []
    failed = {failure["place"] for failure in header["failures"] if "clip" in failure}
    return [place for place in range(shard.stop - shard.start) if place not in failed]


def read_kept(directory: Path, dataset: str, shard: Shard) -> dict[int, workers.Result]:
    """Return the clips at those indices, as if they had just been encoded."""
    places = kept(directory, dataset, shard)
    if not places:
        return {}
    with open(_before(list_of(directory, shard)), encoding="utf-8") as file:
        header, *rows = map(json.loads, file)
    dropped: dict[int, list[str]] = {place: [] for place in places}
    for failure in header["failures"]:
        if "clip" not in failure:
            dropped[failure["place"]].append(failure["error"])
    reader = array_record_module.ArrayRecordReader(os.fspath(file_of(directory, dataset, shard)))
    try:
        stored = reader.read_all()
    finally:
        reader.close()
    return {
        place: workers.Result(record, row, tuple(dropped[place]), row.pop("objects"))
        for place, record, row in zip(places, stored, rows, strict=True)
    }


def write_text(path: Path, text: str) -> None:
    """Write text atomically; an error says how to continue."""
    with _writing(path):
        files.write_text(path, text)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; an error says how to continue."""
    with _writing(path):
        files.write_json(path, value)


def headers(directory: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (split, header) of every finished shard, in order."""
    for path in sorted((directory / "clips").glob("*.jsonl")):
        with open(path) as file:
            yield path.name.rsplit("-", 3)[0], json.loads(file.readline())


def failures(directory: Path) -> Iterator[dict[str, Any]]:
    """Yield what was left out of the finished shards, in order: split, video, error."""
    for split, header in headers(directory):
        for failure in header["failures"]:
            yield {"split": split, "video": failure["video"], "error": failure["error"]}


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn a failed write into a UserError; ArrayRecord's writer raises RuntimeError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        message = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot write {path}: {message}; free some space and run the same "
            "command again; finished shards are kept"
        ) from error
