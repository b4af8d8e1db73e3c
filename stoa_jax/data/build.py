"""Builds a data set: videos, annotations and detections in, ArrayRecord files out.

    python -m stoa_jax.data.build DATASET --manual-dir=DIR --data-dir=OUT
        [--detections=PATH] [--processes=N]

Run the same command again after any stop: finished shards stay. The bytes do not depend on the
number of processes. Clips that cannot be read are named in OUT/failures.jsonl. Exit code 0 when
every split has at least one clip, 2 on an error, 130 when stopped.

A finished data set, OUT/DATASET/1.0.0, is what TFDS expects there, and `build.json` (what it was
built from), `classes.json`, and for every shard, in `clips/`, the ids and texts of its clips.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from array_record.python import array_record_module
from tensorflow_datasets.core import naming, splits

from stoa_jax.data import builders, records, workers
from stoa_jax.errors import UserError

FORMAT = 1  # of the records; raised when they change


@dataclasses.dataclass(frozen=True)
class Shard:
    """A stretch of a split's entries, fixed by their order alone."""

    split: str
    index: int
    count: int  # shards of the split
    start: int
    stop: int

    @property
    def name(self) -> str:
        """As in `train-00003-of-00010`."""
        return f"{self.split}-{self.index:05d}-of-{self.count:05d}"


@dataclasses.dataclass
class Summary:
    """What a build came to, by split."""

    directory: Path
    built: dict[str, int]
    failed: dict[str, int]
    dropped: int = 0
    objects: int = 0


def shards_of(split: str, entries: int) -> list[Shard]:
    """At most 64 shards of at least 16 clips, or shards of 1024 where that is more."""
    size = min(1024, max(16, -(-entries // 64)))
    count = -(-entries // size)
    return [Shard(split, i, count, i * size, min(entries, (i + 1) * size)) for i in range(count)]


def build(
    dataset: str,
    data_dir: str | os.PathLike[str],
    manual_dir: str | os.PathLike[str] | None = None,
    *,
    detections: str | os.PathLike[str] | None = None,
    options: dict[str, Any] | None = None,
    **how: Any,
) -> Summary:
    """Builds a data set, or goes on with one; `how` goes to `build_source`."""
    options = options or {}
    source = builders.open_source(dataset, manual_dir, detections=detections, **options)
    return build_source(
        dataset,
        source,
        data_dir,
        made_from={
            "options": {k: str(v) for k, v in sorted(options.items())},
            "detections": None if detections is None else _identity(Path(detections)),
        },
        root="" if manual_dir is None else str(manual_dir),
        **how,
    )


def build_source(
    dataset: str,
    source: Any,
    data_dir: str | os.PathLike[str],
    *,
    processes: int = 1,
    settings: builders.Settings | None = None,
    made_from: dict[str, Any] | None = None,
    root: str = "",
    limit: int = 0,
    timeout: float = 120.0,
    overwrite: bool = False,
    retry_failed: bool = False,
    progress: bool = True,
) -> Summary:
    """Builds from an open source; `root` is where its files lie."""
    settings = settings or builders.Settings()
    entries = {s: e[:limit] if limit else e for s, e in source.splits.items() if len(e)}
    if not entries:
        raise UserError(f"{dataset}: no clip is listed in {root}{_first(source.skipped)}")
    key = {
        "dataset": dataset,
        "format": FORMAT,
        "settings": dataclasses.asdict(settings),
        **(made_from or {}),
        "limit": limit,
        "entries": _hash(entries),
    }

    final = Path(data_dir).expanduser() / dataset / builders.VERSION
    unfinished = final.with_name(final.name + ".building")
    try:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--data-dir={data_dir}: {error.strerror}: {error.filename}") from None
    with _lock(final.parent / ".lock", dataset):
        if overwrite:
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.rmtree(final, ignore_errors=True)
        if final.exists():
            _same_key(final, key)
            if not retry_failed:
                summary = _summary(final, entries)
                _write_failures(Path(data_dir), dataset, final, source.skipped)
                return summary
            final.rename(unfinished)
            _forget_failed(unfinished)
        elif unfinished.exists():
            _same_key(unfinished, key)
        unfinished.mkdir(exist_ok=True)
        (unfinished / "clips").mkdir(exist_ok=True)
        _write_json(unfinished / "build.json", key)

        todo = [
            shard
            for split, items in entries.items()
            for shard in shards_of(split, len(items))
            if not _is_done(unfinished, dataset, shard)
        ]
        _build_shards(
            workers.Job(dataset, _without_splits(source), settings),
            entries,
            todo,
            unfinished,
            name=functools.partial(_shown, dataset, root),
            processes=processes,
            timeout=timeout,
            progress=progress,
        )
        _write_failures(Path(data_dir), dataset, unfinished, source.skipped)
        summary = _summary(unfinished, entries)
        if not any(summary.built.values()):
            error = next(_failures(unfinished), {"error": "no clips"})
            shutil.rmtree(unfinished)
            raise UserError(
                f"{dataset}: none of {sum(summary.failed.values())} clips could be built; the "
                f"first, {error.get('video')}: {error['error']} (all: {data_dir}/failures.jsonl)"
            )
        _describe(unfinished, final, dataset, data_dir, settings, source, entries, key)
        unfinished.rename(final)
        return dataclasses.replace(summary, directory=final)


def _without_splits(source: Any) -> Any:
    """The source as the processes need it: 2.5 million entries would be copied to each."""
    import copy

    light = copy.copy(source)
    light.splits, light.skipped = {}, []
    return light


def _shown(dataset: str, root: str, entry: Any) -> str:
    """A clip as `failures.jsonl` names it: its id, or the file in a directory of one's own."""
    path = getattr(entry, "video_path", None)
    if path and root and dataset.startswith("folder/"):
        return Path(os.path.relpath(path, root)).as_posix()
    return entry.video_id


def _hash(entries: dict[str, Sequence[Any]]) -> str:
    """Of all that is listed, wherever it lies: directories move, missing videos are found."""
    digest = hashlib.sha256()
    for split, items in entries.items():
        for entry in items:
            fields = (f.name for f in dataclasses.fields(entry) if f.name != "video_path")
            row = [split, *(getattr(entry, name) for name in fields)]
            digest.update(json.dumps(row, default=list).encode() + b"\n")
    return digest.hexdigest()


def _identity(path: Path) -> dict[str, Any]:
    return {"name": path.name, "bytes": path.stat().st_size if path.is_file() else None}


def _same_key(directory: Path, key: dict[str, Any]) -> None:
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
            what = "the annotation files list other clips now"
        elif isinstance(value, dict) and isinstance(old.get(name), dict):
            field = next(f for f in {**value, **old[name]} if value.get(f) != old[name].get(f))
            what = f"{field} was {old[name].get(field)!r} and is {value.get(field)!r} now"
        else:
            what = f"{name} was {old.get(name)!r} and is {value!r} now"
        raise UserError(
            f"{directory} was built otherwise: {what}; --overwrite replaces it, "
            "another --data-dir keeps both"
        )


def _file(directory: Path, dataset: str, shard: Shard) -> Path:
    return directory / (
        f"{dataset.partition('/')[0]}-{shard.split}.array_record-"
        f"{shard.index:05d}-of-{shard.count:05d}"
    )


def _is_done(directory: Path, dataset: str, shard: Shard) -> bool:
    """The list of a shard's clips is written after the shard, so it is the sign of its end."""
    header = _header(directory, shard)
    file = _file(directory, dataset, shard)
    return header is not None and file.exists() and file.stat().st_size == header["file_bytes"]


def _header(directory: Path, shard: Shard) -> dict[str, Any] | None:
    try:
        with open(directory / "clips" / f"{shard.name}.jsonl") as file:
            return json.loads(file.readline())
    except (OSError, ValueError):
        return None


def _build_shards(
    job: workers.Job,
    entries: dict[str, Sequence[Any]],
    todo: list[Shard],
    directory: Path,
    *,
    name: Callable[[Any], str],
    processes: int,
    timeout: float,
    progress: bool,
) -> None:
    """Encodes the entries of all shards in parallel; writes a shard when its last clip is in."""
    total = sum(shard.stop - shard.start for shard in todo)
    tasks = (
        ((number, i), entries[shard.split][i])
        for number, shard in enumerate(todo)
        for i in range(shard.start, shard.stop)
    )
    results: dict[int, dict[int, workers.Result]] = {}
    meter = _Meter(total, progress)
    stream = workers.encode_all(job, tasks, total, processes, timeout)
    with contextlib.closing(stream):
        for (number, i), result in stream:
            shard = todo[number]
            of_shard = results.setdefault(number, {})
            of_shard[i] = result
            if len(of_shard) == shard.stop - shard.start:
                names = [name(e) for e in entries[shard.split][shard.start : shard.stop]]
                _write_shard(directory, job.dataset, shard, results.pop(number), names)
            meter.add(shard.split, bool(result.error))
    meter.end()


def _write_shard(
    directory: Path,
    dataset: str,
    shard: Shard,
    results: dict[int, workers.Result],
    names: Sequence[str],
) -> None:
    """Writes a shard beside its place, then moves it there; then the list of its clips."""
    path = _file(directory, dataset, shard)
    temporary = path.with_name(path.name + ".tmp")
    failures, rows, size = [], [], 0
    with _writing(path):
        writer = array_record_module.ArrayRecordWriter(os.fspath(temporary), "group_size:1")
        try:
            for (_, result), video in zip(sorted(results.items()), names, strict=True):
                failures += [{"video": video, "error": e} for e in result.dropped]
                if result.error:
                    failures.append({"video": video, "error": result.error, "clip": True})
                    continue
                writer.write(result.record)
                rows.append(result.metadata)
                size += len(result.record)
        finally:
            writer.close()
        _sync(temporary)
        temporary.rename(path)
    header = {
        "clips": len(rows),
        "bytes": size,
        "file_bytes": path.stat().st_size,
        "objects": sum(r.objects for r in results.values()),
        "failures": failures,
    }
    lines = [json.dumps(row, ensure_ascii=False) for row in [header, *rows]]
    _write_text(directory / "clips" / f"{shard.name}.jsonl", "\n".join(lines) + "\n")


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with _writing(path):
        temporary.write_text(text, encoding="utf-8")
        _sync(temporary)
        temporary.rename(path)


def _write_json(path: Path, value: Any) -> None:
    _write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _headers(directory: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(split, header) of every finished shard, in order."""
    for path in sorted((directory / "clips").glob("*.jsonl")):
        with open(path) as file:
            yield path.name.rsplit("-", 3)[0], json.loads(file.readline())


def _failures(directory: Path) -> Iterator[dict[str, Any]]:
    for split, header in _headers(directory):
        for failure in header["failures"]:
            yield {"split": split, "video": failure["video"], "error": failure["error"]}


def _summary(directory: Path, entries: dict[str, Sequence[Any]]) -> Summary:
    summary = Summary(directory, dict.fromkeys(entries, 0), dict.fromkeys(entries, 0))
    for split, header in _headers(directory):
        failed = sum(bool(f.get("clip")) for f in header["failures"])
        summary.built[split] += header["clips"]
        summary.failed[split] += failed
        summary.dropped += len(header["failures"]) - failed
        summary.objects += header["objects"]
    return summary


def _write_failures(data_dir: Path, dataset: str, directory: Path, skipped: Sequence[Any]) -> None:
    """OUT/failures.jsonl: the lines of this data set anew, those of others as they are."""
    path = data_dir / "failures.jsonl"
    lines = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                if json.loads(line).get("dataset") != dataset:
                    lines.append(line)
    rows = [{k: v for k, v in dataclasses.asdict(s).items() if v is not None} for s in skipped]
    for row in [*rows, *_failures(directory)]:
        row = {"video": row.pop("video", ""), "error": row.pop("error", ""), **row}
        lines.append(json.dumps({**row, "dataset": dataset}, ensure_ascii=False, default=str))
    _write_text(path, "".join(f"{line}\n" for line in lines))


def _forget_failed(directory: Path) -> None:
    for path in (directory / "clips").glob("*.jsonl"):
        with open(path) as file:
            failed = json.loads(file.readline())["failures"]
        if failed:
            path.unlink()


def _describe(
    directory: Path,
    final: Path,
    dataset: str,
    data_dir: str | os.PathLike[str],
    settings: builders.Settings,
    source: Any,
    entries: dict[str, Sequence[Any]],
    key: dict[str, Any],
) -> None:
    """Writes what TFDS and the pipeline want to know of the finished set."""
    from stoa_jax.data import pipeline

    name = dataset.partition("/")[0]
    infos, fingerprints = [], {}
    for split, items in entries.items():
        headers = [_header(directory, shard) for shard in shards_of(split, len(items))]
        infos.append(
            splits.SplitInfo(
                name=split,
                shard_lengths=[header["clips"] for header in headers],
                num_bytes=sum(header["bytes"] for header in headers),
                filename_template=naming.ShardedFileTemplate(
                    dataset_name=name,
                    data_dir=final,
                    split=split,
                    filetype_suffix="array_record",
                ),
            )
        )
        fingerprints[split] = pipeline.fingerprint(pipeline.read_metadata(directory, split))
    info = builders.builder(dataset, data_dir, settings).info
    info.set_splits(splits.SplitDict(infos))
    info.write_to_directory(directory)
    records.write_class_names(directory, source.class_names)
    _write_json(directory / "build.json", {**key, "fingerprints": fingerprints})


def _first(skipped: Sequence[Any]) -> str:
    if not skipped:
        return ""
    return f"; {len(skipped)} rows were skipped, the first: {skipped[0].error}"


@contextlib.contextmanager
def _lock(path: Path, dataset: str) -> Iterator[None]:
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{dataset} is being built there by another process ({path})") from None
        yield


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Says what a failed write means; ArrayRecord's writer raises RuntimeError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        message = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot write {path}: {message}; make room and run the same command again, finished "
            "shards are kept"
        ) from error


class _Meter:
    """Progress on stderr: in place on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, total: int, shown: bool):
        self.total, self.done, self.failed, self.shown = total, 0, 0, shown and total > 0
        self.began = self.last = time.monotonic()
        self.live = sys.stderr.isatty()

    def add(self, split: str, failed: bool) -> None:
        self.done += 1
        self.failed += failed
        now = time.monotonic()
        if self.shown and now - self.last >= (0.2 if self.live else 10.0):
            self.last = now
            self._show(split)

    def _show(self, split: str, end: str = "") -> None:
        rate = self.done / max(1e-9, time.monotonic() - self.began)
        left = int((self.total - self.done) / max(rate, 1e-9))
        line = (
            f"{split}: {self.done}/{self.total} clips, {rate:.1f}/s, "
            f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left, {self.failed} failed"
        )
        print(f"\r{line}\x1b[K" if self.live else line, end=end or ("" if self.live else "\n"),
              file=sys.stderr, flush=True)  # fmt: skip

    def end(self) -> None:
        if self.shown:
            self._show("all", "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m stoa_jax.data.build",
        description="Builds a data set from the files as published.",
        epilog="data sets: "
        + ", ".join(f"{n}/{c}" for n, configs in builders.DATASETS.items() for c in configs),
    )
    defaults = builders.Settings()
    add = parser.add_argument
    add("dataset", metavar="DATASET", help="such as folder, msrvtt/retrieval, synthetic/qa")
    add("--data-dir", required=True, help="where data sets are built")
    add("--manual-dir", help="the published annotation files and videos")
    add("--detections", help="object detections: VinVL or bottom-up TSV, JSON a video, JSONL")
    add("--processes", type=int, default=os.cpu_count() or 1, help="(%(default)s)")
    add("--frames", type=int, default=defaults.frames, help="a clip (%(default)s)")
    add("--objects", type=int, default=defaults.objects, help="kept a frame (%(default)s)")
    add("--short-side", type=int, default=defaults.short_side, help="of frames (%(default)s)")
    add("--tagger", default=defaults.tagger, help="spaCy pipeline, or our own (%(default)s)")
    add("--timeout", type=float, default=120.0, help="seconds a clip may take (%(default)s)")
    add("--limit", type=int, default=0, help="build the first clips of each split only")
    add("--option", action="append", default=[], metavar="KEY=VALUE", help="of the data set")
    add("--overwrite", action="store_true", help="throw away what was built before")
    add("--retry-failed", action="store_true", help="build shards with failed clips again")
    add("--quiet", action="store_true", help="no progress")
    return parser


def _options(pairs: Sequence[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise UserError(f"--option={pair}: write KEY=VALUE")
    return dict(pair.split("=", 1) for pair in pairs)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        for name in ("processes", "frames", "objects", "short_side"):
            if getattr(args, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1")
        dataset = args.dataset
        configs = builders.DATASETS.get(dataset, ())
        if len(configs) == 1:
            dataset = f"{dataset}/{configs[0]}"
        summary = build(
            dataset,
            args.data_dir,
            args.manual_dir,
            detections=args.detections,
            processes=args.processes,
            settings=builders.Settings(args.frames, args.objects, args.short_side, args.tagger),
            options=_options(args.option),
            limit=args.limit,
            timeout=args.timeout,
            overwrite=args.overwrite,
            retry_failed=args.retry_failed,
            progress=not args.quiet,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    return _report(dataset, args.data_dir, summary)


def _report(dataset: str, data_dir: str, summary: Summary) -> int:
    print(f"{dataset}: {summary.directory}")
    for split, built in summary.built.items():
        print(f"  {split:<12}{built:>9} built{summary.failed[split]:>9} failed")
    if summary.dropped:
        print(f"  {summary.dropped} empty captions, questions or choices left out")
    if not summary.objects:
        print("  no detections: objects are padding")
    if summary.dropped or any(summary.failed.values()):
        print(f"  named in {Path(data_dir) / 'failures.jsonl'}")
    empty = [split for split, built in summary.built.items() if not built]
    if empty:
        print(f"error: no clip of split {empty[0]!r} could be built", file=sys.stderr)
    return 2 if empty else 0


if __name__ == "__main__":
    sys.exit(main())
