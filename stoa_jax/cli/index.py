"""`stoa index …`: create, fill, search and maintain a search index."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoa_jax.cli.shared import find_videos
from stoa_jax.errors import UserError

if TYPE_CHECKING:
    from stoa_jax import Clip
    from stoa_jax.index.index import Index


def register(subparsers: Any) -> None:
    """Add the command `index` and its own commands."""
    parser = subparsers.add_parser(
        "index", help="create, fill, search and maintain a search index over videos"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    create = _command(commands, "create", _create, "create an empty index")
    create.add_argument("--model", help="model of its vectors")
    create.add_argument("--dim", type=int, help="width of the vectors, instead of a model")
    create.add_argument(
        "--segment", type=_segment, default=10.0, help='seconds, or "scene" (default: 10)'
    )
    create.add_argument("--stride", type=float, default=5.0, help="seconds (default: 5)")
    create.add_argument("--backend", default="flat", help="flat or lance (default: flat)")
    create.add_argument(
        "--fusion", action="store_true", help="store fusion features, to re-rank by probability"
    )

    add = _command(commands, "add", _add, "embed videos; those in the index are skipped")
    add.add_argument("videos", nargs="+", help="files, or folders to search for videos")
    add.add_argument("--model", help="default: the one the index was created with")
    add.add_argument(
        "--shard", type=_shard, default=(0, 1), help="I/N: only every N-th video from the I-th on"
    )
    add.add_argument(
        "--detections",
        type=Path,
        help="a file or folder of detections; videos that it does not name are added without",
    )
    add.add_argument(
        "--ray", type=int, metavar="WORKERS", help="embed with so many workers of Ray Data"
    )

    search = _command(commands, "search", _search, "find segments for a sentence or a video")
    search.add_argument("query", help="a sentence; with --video, a file")
    search.add_argument("--video", action="store_true", help="the query is a video file")
    search.add_argument("-k", type=int, default=10, help="number of results (default: 10)")
    search.add_argument("--model", help="default: the one the index was created with")
    search.add_argument(
        "--rerank", type=int, help="number of candidates that the fusion encoder re-ranks"
    )

    search.add_argument("--truncate", action="store_true", help="cut a sentence that is too long")

    delete = _command(commands, "delete", _delete, "delete all segments of some ids")
    delete.add_argument("ids", nargs="+")

    _command(commands, "compact", _compact, "free the space of deleted segments")

    merge = _command(commands, "merge", _merge, "add the segments of other indexes in one commit")
    merge.add_argument("parts", nargs="+", help="indexes, for example those of the shards")
    merge.add_argument("--backend", help="of a new index: flat or lance (default: as the parts)")

    calibrate = _command(
        commands, "calibrate", _calibrate, "measure the threshold below which nothing matched"
    )
    calibrate.add_argument("texts", type=Path, help="file of unanswerable sentences, one per line")
    calibrate.add_argument(
        "--rate", type=float, default=0.05, help="false accepts per query (default: 0.05)"
    )
    calibrate.add_argument("--model", help="default: the one the index was created with")

    _command(commands, "info", _info, "show the size and the settings of an index")


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], description: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=description, description=description)
    parser.add_argument("index", help="directory of the index")
    parser.add_argument("--json", action="store_true", help="print JSON, one object per line")
    parser.set_defaults(run=run)
    return parser


def _segment(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _shard(text: str) -> tuple[int, int]:
    try:
        index, count = map(int, text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; give I/N, for example 0/8") from None
    return index, count


def _create(arguments: argparse.Namespace) -> int:
    from stoa_jax import Index, load

    model = load(arguments.model) if arguments.model else None
    options = {n: getattr(arguments, n) for n in ("dim", "segment", "stride", "backend", "fusion")}
    with Index.create(arguments.index, model, **options) as index:
        _print(arguments, {"index": arguments.index, **dataclasses.asdict(index.settings)})
    return 0


def _add(arguments: argparse.Namespace) -> int:
    videos = find_videos(arguments.videos)
    if arguments.ray and arguments.detections:
        raise UserError("--detections: Ray workers read no detections; leave out --ray")
    with _opened(arguments) as index:
        progress = sys.stderr.isatty()
        if arguments.ray:
            from stoa_jax.index import ray_job

            first, count = arguments.shard
            source = arguments.model or index.settings.model
            assert source is not None  # `_opened` needs it too
            added = ray_job.add(
                index, source, videos[first::count], workers=arguments.ray, progress=progress
            )
        else:
            clips = _with_detections(videos, arguments.detections)
            added = index.add(clips, progress=progress, shard=arguments.shard)
        _print(arguments, dataclasses.asdict(added))
    if added.failed:
        record = os.path.join(arguments.index, "failures.jsonl")
        print(f"{added.failed} failed; the reasons are in {record}", file=sys.stderr)
    return 1 if added.failed else 0


def _with_detections(videos: list[str], detections: Path | None) -> "list[str | Clip]":
    """Return the videos, those that a file of detections names as clips with them."""
    if detections is None:
        return list(videos)
    from stoa_jax import Clip
    from stoa_jax.inference.detections import names_video

    if not detections.exists():
        raise UserError(f"--detections: {detections}: no such file or directory")
    clips = [
        Clip(v, None, None, str(detections)) if names_video(detections, Path(v)) else v
        for v in videos
    ]
    without = sum(isinstance(clip, str) for clip in clips)
    if without:
        print(
            f"note: {detections} has nothing about {without} of {len(videos)} videos; they are "
            "added without objects",
            file=sys.stderr,
        )
    return clips


def _search(arguments: argparse.Namespace) -> int:
    query = Path(arguments.query) if arguments.video else arguments.query
    with _opened(arguments) as index:
        hits = index.search(query, arguments.k, rerank=arguments.rerank)
    for hit in hits:
        if arguments.json:
            print(json.dumps(dataclasses.asdict(hit)))
            continue
        span = "" if hit.start is None else f"  {_clock(hit.start)}-{_clock(hit.end)}"
        sure = "" if hit.probability is None else f"  {hit.probability:.3f}"
        verdict = "  no match" if hit.matched is False else ""
        print(f"{hit.score:.4f}{sure}  {_shown(hit.video or hit.id)}{span}{verdict}")
    return 0


def _delete(arguments: argparse.Namespace) -> int:
    with _opened(arguments, model=False) as index:
        _print(arguments, {"deleted": index.delete(arguments.ids)})
    return 0


def _compact(arguments: argparse.Namespace) -> int:
    with _opened(arguments, model=False) as index:
        index.compact()
        _print(arguments, {"segments": len(index)})
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    from stoa_jax import Index

    with Index.merge(arguments.index, arguments.parts, backend=arguments.backend) as index:
        _print(arguments, {"segments": len(index)})
    return 0


def _calibrate(arguments: argparse.Namespace) -> int:
    try:
        lines = arguments.texts.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{arguments.texts}: cannot be read: {error.strerror}") from error
    texts = [line.strip() for line in lines if line.strip()]
    with _opened(arguments) as index:
        index.calibrate(texts, rate=arguments.rate)
        settings = index.settings
    _print(arguments, {"threshold": settings.threshold, "measured": settings.threshold_note})
    return 0


def _info(arguments: argparse.Namespace) -> int:
    with _opened(arguments, model=False) as index:
        videos = len(index.ids())
        _print(
            arguments,
            {
                "segments": len(index),
                "videos": videos,
                "search": index.searched_by,
                **dataclasses.asdict(index.settings),
            },
        )
    return 0


def _opened(arguments: argparse.Namespace, *, model: bool = True) -> "Index":
    from stoa_jax import Index, load

    if not model:
        return Index.open(arguments.index)
    source = arguments.model
    if source is None:
        with Index.open(arguments.index) as index:
            source = index.settings.model
    if source is None:
        raise UserError(f"{arguments.index}: it names no model; pass --model=PATH")
    truncate = getattr(arguments, "truncate", False)
    return Index.open(arguments.index, load(source, truncate=truncate))


def _print(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    if arguments.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        if value not in (None, ""):
            print(f"{name}: {value}")


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)}:{rest:04.1f}"


def _shown(text: str) -> str:
    # A file's name must not control the terminal.
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
