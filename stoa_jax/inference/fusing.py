"""Run batches of videos through the fusion encoder: features, and match logits of pairs.

Shapes: n videos, m texts, L text positions.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from stoa_jax.inference import batching, checks, programs
from stoa_jax.inference.opened import Opened
from stoa_jax.inference.videos import Clip, Failure, Prepared, Video, prepare

if TYPE_CHECKING:
    from stoa_jax.models.stoa import Stoa

TEXTS_AT_ONCE = 256
PAIRS_PER_VIDEO = 8  # pairs fused at once, per video of a batch; texts are short


@dataclasses.dataclass(frozen=True)
class Request:
    """One call of the public interface: its name, its options, and the videos that failed."""

    call: str
    batch_size: int = 16
    progress: bool = False
    on_error: str = "raise"
    failed: list[Failure] = dataclasses.field(default_factory=list)

    def result(self, found: Any) -> Any:
        """Return what the call returns: with `on_error="skip"`, also the videos that failed."""
        return (found, self.failed) if self.on_error == "skip" else found


def video_features(
    model: Opened, network: "Stoa", videos: Sequence[Video | Clip], request: Request
) -> Iterator[tuple[np.ndarray, Any]]:
    """Yield (indices, features) of batches of videos, on the host, in order."""
    videos = checks.listed(videos, request.call, "videos")
    how = model.preprocessing(fused=True)

    def ready(i: int, video: Video | Clip) -> tuple[int, Prepared]:
        return i, prepare(video, how)

    waiting = None
    for batch in batching.prepared(
        videos,
        ready,
        batch_size=request.batch_size,
        call=request.call,
        on_error=request.on_error,
        failed=request.failed,
        progress=request.progress,
    ):
        which = np.array([i for i, _ in batch])
        clips = [clip for _, clip in batch]
        model.note_missing_detections(request.call, clips)
        started = batching.run_padded(
            lambda *x: programs.video_features(network, *x), *features_input(clips)
        )
        if waiting is not None:
            yield waiting[0], batching.on_host(waiting[1], len(waiting[0]))
        waiting = which, started
    if waiting is not None:
        yield waiting[0], batching.on_host(waiting[1], len(waiting[0]))


def features_input(clips: Sequence[Prepared]) -> tuple[np.ndarray, ...]:
    """Return pixels, boxes, classes and scores of clips as one batch."""
    return tuple(np.stack([getattr(clip, name) for clip in clips]) for name in Prepared._fields[:4])


def match_logits(
    model: Opened,
    network: "Stoa",
    videos: Sequence[Video | Clip],
    tokens: np.ndarray,
    request: Request,
    *,
    pairs: bool = False,
) -> np.ndarray:
    """Return the match head's logits [n, m, 2] of videos and texts [m, L], or [n, 2] of pairs."""
    videos = checks.listed(videos, request.call, "videos")
    if pairs:
        checks.one_for_each(f"{request.call}: pairs=True", videos, tokens, "text")
    batching.check_batch_size(request.batch_size, request.call)
    size = request.batch_size * PAIRS_PER_VIDEO
    text = batching.in_batches(lambda x: programs.text_features(network, x), TEXTS_AT_ONCE, tokens)
    # The head of `released` normalises over all pairs of the call, so it runs last.
    each_pair_alone = model.config.match_head != "bilinear"
    found, fused = [], []
    for which, features in video_features(model, network, videos, request):
        if pairs:
            rows, columns = np.arange(len(which)), which
        else:
            rows = np.repeat(np.arange(len(which)), len(tokens))
            columns = np.tile(np.arange(len(tokens)), len(which))
        for start in range(0, len(rows), size):
            row, column = rows[start : start + size], columns[start : start + size]
            pair = jax.tree.map(lambda x, at=row: x[at], features)
            words = jax.tree.map(lambda x, at=column: x[at], text)
            out = batching.run_padded(lambda *x: programs.fuse_pairs(network, *x), pair, words)
            if each_pair_alone:
                found.append(np.asarray(programs.match_logits(network, *out))[: len(row)])
            else:
                fused.append(batching.on_host(out, len(row)))
    if fused:
        found = [_of_all_pairs(network, fused)]
    logits = np.concatenate([np.zeros((0, 2), np.float32), *found])
    return logits if pairs else logits.reshape(-1, len(tokens), 2)


def _of_all_pairs(network: "Stoa", fused: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    cls, sep = (np.concatenate(x) for x in zip(*fused, strict=True))
    count = len(cls)
    rows = batching.power_of_two(count)
    # The norms over all rows must not change, so the padding is zero.
    cls, sep = (np.pad(x, ((0, rows - count), (0, 0))) for x in (cls, sep))
    return np.asarray(programs.match_logits(network, cls, sep))[:count]
