"""Build a data set: videos, annotations and detections in, ArrayRecord files out.

    python -m stoa_jax.data.build DATASET --manual-dir=DIR --data-dir=OUT
        [--detections=PATH] [--processes=N]

Run the same command again after any stop: finished shards are kept. The bytes do not depend on the
number of processes. Unreadable clips are listed in OUT/failures.jsonl. The exit code is 0 if every
split has at least one clip, 2 on an error, 130 if stopped.

A finished data set, OUT/DATASET/1.0.0, holds the files that TFDS expects, `build.json` (what it was
built from), `classes.json`, and in `clips/`, for every shard, the ids and texts of its clips.
"""

import argparse
import functools
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stoa_jax import command_line
from stoa_jax.data import builders, sources
from stoa_jax.data.build.manifest import Summary
from stoa_jax.data.build.run import CLIP_SECONDS, Run, build, encode_parts
from stoa_jax.errors import UserError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m stoa_jax.data.build",
        description="Build a data set from its published files.",
        epilog="data sets: " + ", ".join(sources.DATA_SETS),
    )
    defaults = builders.Settings()
    add = parser.add_argument
    add("dataset", metavar="DATASET", help="such as folder, msrvtt/retrieval, synthetic/qa")
    add("--data-dir", required=True, help="directory of built data sets")
    add("--manual-dir", help="directory with the published annotations and videos")
    add(
        "--detections",
        help="object detections: VinVL or bottom-up TSV, one JSON per video, JSON lines",
    )
    add("--processes", type=int, default=os.cpu_count() or 1, help="(%(default)s)")
    add("--frames", type=int, default=defaults.frames, help="per clip (%(default)s)")
    add("--objects", type=int, default=defaults.objects, help="kept per frame (%(default)s)")
    add(
        "--short-side",
        type=int,
        default=defaults.short_side,
        help="of stored frames, pixels (%(default)s)",
    )
    add("--tagger", default=defaults.tagger, help="a spaCy pipeline, default or none (%(default)s)")
    add("--timeout", type=float, default=CLIP_SECONDS, help="seconds per clip (%(default)s)")
    add("--limit", type=int, default=0, help="build only the first N clips of each split")
    add(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the data set",
    )
    add("--overwrite", action="store_true", help="replace an earlier build")
    add("--retry-failed", action="store_true", help="try the failed clips again")
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
    """Run the command line; return the exit code."""
    args = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    return command_line.run(
        lambda: _build(args, run), stopped="stopped; run the same command again to continue"
    )


def _build(args: argparse.Namespace, run: Run | None) -> int:
    for name in ("processes", "frames", "objects", "short_side"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    dataset = args.dataset
    configs = sources.configurations().get(dataset, ())
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
    return _report(dataset, args.data_dir, summary)


def _report(dataset: str, data_dir: str, summary: Summary) -> int:
    print(f"{dataset}: {summary.directory}")
    for split, count in summary.built.items():
        print(f"  {split:<12}{count:>9} built{summary.failed[split]:>9} failed")
    if summary.dropped:
        print(f"  left out: {summary.dropped} texts without words or clips with boxes outside")
    if not summary.objects:
        print("  no detections; objects are padding")
    elif summary.undetected:
        print(f"  {summary.undetected} clips without detections; their objects are padding")
    if summary.skipped:
        print(f"  {summary.skipped} rows skipped")
    failed = any(summary.failed.values())
    if failed or summary.dropped or summary.skipped or summary.undetected:
        print(f"  listed in {Path(data_dir) / 'failures.jsonl'}")
    if failed:
        print("  after repairing their videos, run the same command with --retry-failed")
    empty = [split for split, count in summary.built.items() if not count]
    if empty:
        print(f"error: no clip of split {empty[0]!r} could be built", file=sys.stderr)
    return 2 if empty else 0


if __name__ == "__main__":
    sys.exit(main())
