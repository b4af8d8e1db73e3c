"""The metadata of a build: what it is made from, its counts, and its failures.

`build.json` holds everything that decides the bytes; a build continues only if that is unchanged.
The counts come from the headers of the finished shards.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from tensorflow_datasets.core import naming, splits

from stoa_jax import locks
from stoa_jax.data import builders, records
from stoa_jax.data import split as built
from stoa_jax.data.build import shards
from stoa_jax.data.sources import Skipped, Source, Undetected
from stoa_jax.errors import UserError

FORMAT = 1  # version of the records; raise it when they change


@dataclasses.dataclass
class Summary:
    """Counts of a build, by split."""

    directory: Path
    built: dict[str, int]
    failed: dict[str, int]
    dropped: int = 0  # texts without words, and clips with boxes outside the frame
    objects: int = 0
    skipped: int = 0  # rows of annotation files, and lines of detections
    undetected: int = 0  # clips without detections


def hash_of(entries: dict[str, Sequence[Any]]) -> str:
    """Hash all entries without their paths, because directories move and videos get added."""
    digest = hashlib.sha256()
    for split, items in entries.items():
        for entry in items:
            fields = (f.name for f in dataclasses.fields(entry) if f.name != "video_path")
            row = [split, *(getattr(entry, name) for name in fields)]
            digest.update(json.dumps(row, default=list).encode() + b"\n")
    return digest.hexdigest()


def identity(path: Path) -> dict[str, Any]:
    """Return the properties of a detections file that may not change within a data set."""
    return {"name": path.name, "bytes": path.stat().st_size if path.is_file() else None}


def refuse_another(directory: Path, key: dict[str, Any]) -> None:
    """Raise UserError if a directory was built from something other than `key`."""
    path = directory / "build.json"
    try:
        old = json.loads(path.read_text())
    except (OSError, ValueError):
        raise UserError(
            f"{directory} was not made by this program, or its build.json is damaged; "
            "--overwrite replaces it"
        ) from None
    for name, value in key.items():
        if old.get(name) == value:
            continue
        if name == "entries":
            what = "the annotation files now list other clips"
        elif isinstance(value, dict) and isinstance(old.get(name), dict):
            field = next(f for f in {**value, **old[name]} if value.get(f) != old[name].get(f))
            what = f"{field} was {old[name].get(field)!r} and is {value.get(field)!r} now"
        else:
            what = f"{name} was {old.get(name)!r} and is {value!r} now"
        raise UserError(
            f"{directory} was built differently: {what}; --overwrite replaces it, "
            "another --data-dir keeps both"
        )


def summarize(
    directory: Path, entries: dict[str, Sequence[Any]], skipped: Sequence[Skipped]
) -> Summary:
    """Count the contents of the finished shards by split."""
    none = dict.fromkeys(entries, 0)
    undetected = sum(isinstance(s, Undetected) for s in skipped)
    summary = Summary(directory, dict(none), dict(none), undetected=undetected)
    summary.skipped = len(skipped) - undetected
    for split, header in shards.headers(directory):
        failed = sum(bool(f.get("clip")) for f in header["failures"])
        summary.built[split] += header["clips"]
        summary.failed[split] += failed
        summary.dropped += len(header["failures"]) - failed
        summary.objects += header["objects"]
    return summary


def write_failures(
    data_dir: Path, dataset: str, directory: Path, skipped: Sequence[Skipped]
) -> None:
    """Rewrite this data set's lines in OUT/failures.jsonl; keep those of other data sets."""
    path = data_dir / "failures.jsonl"
    rows = [{k: v for k, v in dataclasses.asdict(s).items() if v is not None} for s in skipped]
    with lock(data_dir / ".lock", wait=True):
        lines = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError):
                if json.loads(line).get("dataset") != dataset:
                    lines.append(line)
        for row in [*rows, *shards.failures(directory)]:
            row = {"video": row.pop("video", ""), "error": row.pop("error", ""), **row}
            lines.append(json.dumps({**row, "dataset": dataset}, ensure_ascii=False, default=str))
        shards.write_text(path, "".join(f"{line}\n" for line in lines))


def describe(
    directory: Path,
    final: Path,
    dataset: str,
    data_dir: str | os.PathLike[str],
    settings: builders.Settings,
    source: Source,
    entries: dict[str, Sequence[Any]],
    key: dict[str, Any],
) -> None:
    """Write the files that TFDS and the pipeline read to describe the finished data set."""
    name = dataset.partition("/")[0]
    infos, fingerprints = [], {}
    for split, items in entries.items():
        parts = shards.shards_of(split, len(items))
        found = [shards.header_of(shards.list_of(directory, shard)) for shard in parts]
        headers = [header for header in found if header is not None]
        assert len(headers) == len(parts)  # all shards are finished
        infos.append(
            splits.SplitInfo(
                name=split,
                shard_lengths=[header["clips"] for header in headers],
                num_bytes=sum(header["bytes"] for header in headers),
                filename_template=naming.ShardedFileTemplate(
                    dataset_name=name,
                    data_dir=cast(Any, final),  # TFDS takes any path
                    split=split,
                    filetype_suffix="array_record",
                ),
            )
        )
        fingerprints[split] = built.fingerprint(built.read_metadata(directory, split))
    info = builders.builder(dataset, data_dir, settings).info
    info.set_splits(splits.SplitDict(infos))
    info.write_to_directory(directory)
    records.write_class_names(directory, source.class_names)
    shards.write_json(directory / "build.json", {**key, "fingerprints": fingerprints})


@contextlib.contextmanager
def lock(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold a lock file; if another process holds it, wait or raise UserError."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locks.exclusive(path, "build", math.inf if wait else 0.0))
        except locks.Locked:
            raise UserError(f"{path.parent}: another process is building there") from None
        yield
