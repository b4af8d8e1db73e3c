"""Build a data set from an open source, shard by shard, resumable at every stop."""

import contextlib
import copy
import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from stoa_jax import files
from stoa_jax.data import builders
from stoa_jax.data.build import manifest, shards, workers
from stoa_jax.data.sources import Skipped, Source
from stoa_jax.errors import UserError

Run = Callable[[workers.Job, Sequence[shards.Part], Path], None]
CLIP_SECONDS = 120.0  # a clip that takes longer counts as failed


def encode_parts(
    job: workers.Job,
    parts: Sequence[shards.Part],
    directory: Path,
    *,
    processes: int = 1,
    timeout: float = CLIP_SECONDS,
    progress: bool = False,
) -> None:
    """Encode all entries in parallel processes; write each shard when its last clip arrives."""
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
        for key, result in stream:
            p, i = cast(tuple[int, int], key)
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
) -> manifest.Summary:
    """Build a data set, or continue one; `how` is passed to `build_source`."""
    options = options or {}
    source = builders.open_source(dataset, manual_dir, detections=detections, **options)
    return build_source(
        dataset,
        source,
        data_dir,
        made_from={
            "options": {k: str(v) for k, v in sorted(options.items())},
            "detections": None if detections is None else manifest.identity(Path(detections)),
        },
        root="" if manual_dir is None else str(manual_dir),
        **how,
    )


def build_source(
    dataset: str,
    source: Source,
    data_dir: str | os.PathLike[str],
    *,
    run: Run = encode_parts,
    settings: builders.Settings | None = None,
    made_from: dict[str, Any] | None = None,
    root: str = "",
    limit: int = 0,
    overwrite: bool = False,
    retry_failed: bool = False,
) -> manifest.Summary:
    """Build from an open source whose files are in `root`; `run` builds the missing shards."""
    settings = settings or builders.Settings()
    entries = {s: e[:limit] if limit else e for s, e in source.splits.items() if len(e)}
    if not entries:
        raise UserError(f"{dataset}: no clip is listed in {root}{_first(source.skipped)}")
    key = {
        "dataset": dataset,
        "format": manifest.FORMAT,
        "settings": dataclasses.asdict(settings),
        **(made_from or {}),
        "limit": limit,
        "entries": manifest.hash_of(entries),
    }

    final = Path(data_dir).expanduser() / dataset / builders.VERSION
    unfinished = final.with_name(final.name + ".building")
    try:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--data-dir={data_dir}: {error.strerror}: {error.filename}") from None
    with manifest.lock(final.parent / ".lock"):
        if overwrite:
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.rmtree(final, ignore_errors=True)
        if final.exists():
            manifest.refuse_another(final, key)
            if not retry_failed:
                manifest.write_failures(Path(data_dir), dataset, final, source.skipped)
                return manifest.summarize(final, entries, source.skipped)
            final.rename(unfinished)
            shards.set_aside(unfinished)
        elif unfinished.exists():
            manifest.refuse_another(unfinished, key)
        unfinished.mkdir(exist_ok=True)
        (unfinished / "clips").mkdir(exist_ok=True)
        files.remove_partial(unfinished)
        files.remove_partial(unfinished / "clips")
        shards.write_json(unfinished / "build.json", key)

        parts = [
            shards.Part(shard, items[shard.start : shard.stop], root)
            for split, items in entries.items()
            for shard in shards.shards_of(split, len(items))
            if not shards.is_done(unfinished, dataset, shard)
        ]
        run(workers.Job(dataset, _without_splits(source), settings), parts, unfinished)
        manifest.write_failures(Path(data_dir), dataset, unfinished, source.skipped)
        summary = manifest.summarize(unfinished, entries, source.skipped)
        if not any(summary.built.values()):
            error = next(shards.failures(unfinished), {"error": "no clips"})
            shutil.rmtree(unfinished)
            raise UserError(
                f"{dataset}: none of {sum(summary.failed.values())} clips could be built; the "
                f"first, {error.get('video')}: {error['error']} (all: {data_dir}/failures.jsonl)"
            )
        manifest.describe(unfinished, final, dataset, data_dir, settings, source, entries, key)
        unfinished.rename(final)
        return dataclasses.replace(summary, directory=final)


def _without_splits(source: Source) -> Source:
    """Return a copy of the source without its entries, which would be sent to every process."""
    light = copy.copy(source)
    light.splits, light.skipped = {}, []
    return light


def _shown(dataset: str, root: str, entry: Any) -> str:
    """Return a clip's name in `failures.jsonl`: its id, or its file in a folder of your own."""
    path = getattr(entry, "video_path", None)
    if path and root and dataset.startswith("folder/"):
        return Path(os.path.relpath(path, root)).as_posix()
    return entry.video_id


def _first(skipped: Sequence[Skipped]) -> str:
    if not skipped:
        return ""
    return f"; {len(skipped)} rows were skipped, the first: {skipped[0].error}"


class _Meter:
    """Progress on stderr: updated in place on a terminal, else a line every ten seconds."""

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
