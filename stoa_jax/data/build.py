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
import copy
import dataclasses
import functools
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stoa_jax.data import bookkeeping, builders, shards, workers
from stoa_jax.errors import UserError

Run = Callable[[workers.Job, Sequence[shards.Part], Path], None]
CLIP_SECONDS = 120.0  # a clip that takes longer has failed


def encode_parts(
    job: workers.Job,
    parts: Sequence[shards.Part],
    directory: Path,
    *,
    processes: int = 1,
    timeout: float = CLIP_SECONDS,
    progress: bool = False,
) -> None:
    """Encodes all entries in parallel processes; writes a shard when its last clip is in."""
    kept = [set(shards.kept(directory, job.dataset, part.shard)) for part in parts]
    due = [len(part.entries) - len(done) for part, done in zip(parts, kept, strict=True)]
    total = sum(due)
    tasks = (
        ((p, i), entry)
        for p, part in enumerate(parts)
        for i, entry in enumerate(part.entries)
        if i not in kept[p]
    )
    results: dict[int, dict[int, workers.Result]] = {}
    meter = _Meter(total, progress)
    stream = workers.encode_all(job, tasks, total, processes, timeout)
    with contextlib.closing(stream):
        for (p, i), result in stream:
            part, of_part = parts[p], results.setdefault(p, {})
            of_part[i] = result
            if len(of_part) == due[p]:
                of_part |= shards.read_kept(directory, job.dataset, part.shard)
                in_order = [of_part[i] for i in range(len(of_part))]
                names = [_shown(job.dataset, part.root, entry) for entry in part.entries]
                shards.write(directory, job.dataset, part.shard, in_order, names)
                del results[p]
            meter.add(part.shard.split, bool(result.error))
    meter.end()


def build(
    dataset: str,
    data_dir: str | os.PathLike[str],
    manual_dir: str | os.PathLike[str] | None = None,
    *,
    detections: str | os.PathLike[str] | None = None,
    options: dict[str, Any] | None = None,
    **how: Any,
) -> bookkeeping.Summary:
    """Builds a data set, or goes on with one; `how` goes to `build_source`."""
    options = options or {}
    source = builders.open_source(dataset, manual_dir, detections=detections, **options)
    return build_source(
        dataset,
        source,
        data_dir,
        made_from={
            "options": {k: str(v) for k, v in sorted(options.items())},
            "detections": None if detections is None else bookkeeping.identity(Path(detections)),
        },
        root="" if manual_dir is None else str(manual_dir),
        **how,
    )


def build_source(
    dataset: str,
    source: Any,
    data_dir: str | os.PathLike[str],
    *,
    run: Run = encode_parts,
    settings: builders.Settings | None = None,
    made_from: dict[str, Any] | None = None,
    root: str = "",
    limit: int = 0,
    overwrite: bool = False,
    retry_failed: bool = False,
) -> bookkeeping.Summary:
    """Builds from an open source whose files lie in `root`; `run` builds the missing shards."""
    settings = settings or builders.Settings()
    entries = {s: e[:limit] if limit else e for s, e in source.splits.items() if len(e)}
    if not entries:
        raise UserError(f"{dataset}: no clip is listed in {root}{_first(source.skipped)}")
    key = {
        "dataset": dataset,
        "format": bookkeeping.FORMAT,
        "settings": dataclasses.asdict(settings),
        **(made_from or {}),
        "limit": limit,
        "entries": bookkeeping.hash_of(entries),
    }

    final = Path(data_dir).expanduser() / dataset / builders.VERSION
    unfinished = final.with_name(final.name + ".building")
    try:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--data-dir={data_dir}: {error.strerror}: {error.filename}") from None
    with bookkeeping.lock(final.parent / ".lock"):
        if overwrite:
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.rmtree(final, ignore_errors=True)
        if final.exists():
            bookkeeping.refuse_another(final, key)
            if not retry_failed:
                bookkeeping.write_failures(Path(data_dir), dataset, final, source.skipped)
                return bookkeeping.summarize(final, entries, source.skipped)
            final.rename(unfinished)
            shards.set_aside(unfinished)
        elif unfinished.exists():
            bookkeeping.refuse_another(unfinished, key)
        unfinished.mkdir(exist_ok=True)
        (unfinished / "clips").mkdir(exist_ok=True)
        shards.write_json(unfinished / "build.json", key)

        parts = [
            shards.Part(shard, items[shard.start : shard.stop], root)
            for split, items in entries.items()
            for shard in shards.shards_of(split, len(items))
            if not shards.is_done(unfinished, dataset, shard)
        ]
        run(workers.Job(dataset, _without_splits(source), settings), parts, unfinished)
        bookkeeping.write_failures(Path(data_dir), dataset, unfinished, source.skipped)
        summary = bookkeeping.summarize(unfinished, entries, source.skipped)
        if not any(summary.built.values()):
            error = next(shards.failures(unfinished), {"error": "no clips"})
            shutil.rmtree(unfinished)
            raise UserError(
                f"{dataset}: none of {sum(summary.failed.values())} clips could be built; the "
                f"first, {error.get('video')}: {error['error']} (all: {data_dir}/failures.jsonl)"
            )
        bookkeeping.describe(unfinished, final, dataset, data_dir, settings, source, entries, key)
        unfinished.rename(final)
        return dataclasses.replace(summary, directory=final)


def _without_splits(source: Any) -> Any:
    """The source as the processes need it: 2.5 million entries would be copied to each."""
    light = copy.copy(source)
    light.splits, light.skipped = {}, []
    return light


def _shown(dataset: str, root: str, entry: Any) -> str:
    """How `failures.jsonl` names a clip: its id, or the file in a directory of one's own."""
    path = getattr(entry, "video_path", None)
    if path and root and dataset.startswith("folder/"):
        return Path(os.path.relpath(path, root)).as_posix()
    return entry.video_id


def _first(skipped: Sequence[Any]) -> str:
    if not skipped:
        return ""
    return f"; {len(skipped)} rows were skipped, the first: {skipped[0].error}"


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
    add("--timeout", type=float, default=CLIP_SECONDS, help="seconds a clip may take (%(default)s)")
    add("--limit", type=int, default=0, help="build the first clips of each split only")
    add("--option", action="append", default=[], metavar="KEY=VALUE", help="of the data set")
    add("--overwrite", action="store_true", help="throw away what was built before")
    add("--retry-failed", action="store_true", help="build the failed clips again")
    add("--quiet", action="store_true", help="no progress")
    return parser


def _options(pairs: Sequence[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise UserError(f"--option={pair}: write KEY=VALUE")
    return dict(pair.split("=", 1) for pair in pairs)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None, run: Run | None = None) -> int:
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
        found = args.manual_dir and Path(args.manual_dir).is_dir()
        if found and not args.quiet:  # a large table takes a minute
            print(f"{dataset}: reading the files in {args.manual_dir}", file=sys.stderr, flush=True)
        summary = build(
            dataset,
            args.data_dir,
            args.manual_dir,
            detections=args.detections,
            run=run
            or functools.partial(
                encode_parts,
                processes=args.processes,
                timeout=args.timeout,
                progress=not args.quiet,
            ),
            settings=builders.Settings(args.frames, args.objects, args.short_side, args.tagger),
            options=_options(args.option),
            limit=args.limit,
            overwrite=args.overwrite,
            retry_failed=args.retry_failed,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    return _report(dataset, args.data_dir, summary)


def _report(dataset: str, data_dir: str, summary: bookkeeping.Summary) -> int:
    print(f"{dataset}: {summary.directory}")
    for split, count in summary.built.items():
        print(f"  {split:<12}{count:>9} built{summary.failed[split]:>9} failed")
    if summary.dropped:
        print(f"  {summary.dropped} texts without words, or clips with boxes outside, left out")
    if not summary.objects:
        print("  no detections: objects are padding")
    elif summary.undetected:
        print(f"  {summary.undetected} clips without detections: their objects are padding")
    if summary.skipped:
        print(f"  {summary.skipped} rows skipped")
    failed = any(summary.failed.values())
    if failed or summary.dropped or summary.skipped or summary.undetected:
        print(f"  named in {Path(data_dir) / 'failures.jsonl'}")
    if failed:
        print("  when their videos are mended, the same command with --retry-failed builds them")
    empty = [split for split, count in summary.built.items() if not count]
    if empty:
        print(f"error: no clip of split {empty[0]!r} could be built", file=sys.stderr)
    return 2 if empty else 0


if __name__ == "__main__":
    sys.exit(main())
