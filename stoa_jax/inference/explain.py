"""Explain a match: which objects were followed, and which words they were matched to.

Shapes: T frames, H and W patches of a frame, N trajectories, A actions, L text positions.
"""

import dataclasses
import functools
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stoa_jax import ops
from stoa_jax.errors import MissingHead
from stoa_jax.inference import batching, programs
from stoa_jax.inference.matched import Action, Trajectory
from stoa_jax.inference.opened import Opened
from stoa_jax.inference.videos import Clip, Prepared, Video, prepare

if TYPE_CHECKING:
    from stoa_jax.models.stoa import Stoa
    from stoa_jax.text import Tagger


@dataclasses.dataclass(frozen=True, eq=False)
class Explanation:
    """The matches of a video and a text, and the data to draw them."""

    text: str
    times: np.ndarray  # [T] seconds; frame numbers if the video is an array
    trajectories: list[Trajectory]
    actions: list[Action]
    probability: float  # probability that the text describes the video
    frames: list[np.ndarray]  # T of uint8 [H, W, 3], as decoded
    crop: np.ndarray  # [4] xyxy, the part of a frame that the model sees, as fractions

    def draw(self, path: str | PathLike[str]) -> None:
        """Draw frames, boxes, words and attention as PNG, animated WebP or MP4, by the suffix.

        >>> model.explain(clip, "a triangle moves").draw("film.webp")
        """
        from stoa_jax.inference.drawing import draw

        draw(self, Path(path))

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the frames as JSON values.

        >>> sorted(model.explain(clip, "a triangle moves").to_dict())
        ['actions', 'crop', 'probability', 'text', 'times', 'trajectories']
        """
        return {
            "text": self.text,
            "times": self.times.tolist(),
            "probability": self.probability,
            "trajectories": [
                {
                    "name": t.name,
                    "boxes": t.boxes.round(5).tolist(),
                    "shown": t.shown.tolist(),
                    "score": t.score,
                    "word": t.word,
                    "word_score": t.word_score,
                }
                for t in self.trajectories
            ],
            "actions": [
                {
                    "word": a.word,
                    "word_score": a.word_score,
                    "attention": a.attention.astype(float).round(6).tolist(),
                }
                for a in self.actions
            ],
            "crop": self.crop.tolist(),
        }


def explain(model: Opened, video: Video | Clip, text: str) -> Explanation:
    """Return the matches and the match probability of one video and one text."""
    network = model.needs("match", "explain")
    if not model.has & {"trajectories", "actions"}:
        raise MissingHead(
            f"explain: {model.source} has neither trajectories nor actions; train a model with "
            "--config.model.objects=true or --config.model.actions=true"
        )
    [words] = model.tokens([text], "explain", None)
    clip = batching.prepare_one(
        lambda: prepare(video, model.preprocessing(fused=True), keep_frames=True), "explain"
    )
    model.note_missing_detections("explain", [clip])
    inputs = [getattr(clip, name)[None] for name in ("pixels", "boxes", "classes", "scores")]
    video_features = programs.video_features(network, *inputs)
    text_features = programs.text_features(network, words[None])
    nouns, verbs = _tagged(model, text)
    found = batching.on_host(
        programs.align_words(
            network, video_features, text_features, words[None], nouns[None], verbs[None]
        ),
        1,
    )
    logits = programs.match_logits(
        network, *programs.fuse_pairs(network, video_features, text_features)
    )
    end = int(np.asarray(text_features.sep_index)[0])
    spelled = functools.partial(_word_at, model, text, end)
    chosen = np.asarray(video_features.object_classes)[0]
    trajectories = [
        _trajectory(clip, kind, mine, spelled(column), _score(scores, column))
        for kind, mine, column, scores in zip(
            chosen.tolist(),
            _members(network, inputs),
            found.trajectories[0].tolist(),
            found.trajectory_scores[0],
            strict=True,
        )
        if kind >= 0
    ]
    return Explanation(
        text,
        clip.times,
        trajectories,
        _actions(network, found, inputs, spelled),
        float(model.probability(np.asarray(logits))[0]),
        list(clip.frames),
        clip.crop,
    )


def _actions(
    network: "Stoa",
    found: programs.Alignments,
    inputs: list[np.ndarray],
    spelled: Callable[[int], str | None],
) -> list[Action]:
    if not found.actions.shape[1]:
        return []
    attention = np.asarray(programs.action_attention(network, *inputs[:3]))[0]
    return [
        Action(spelled(column), _score(scores, column), weights)
        for column, scores, weights in zip(
            found.actions[0].tolist(), found.action_scores[0], attention, strict=True
        )
    ]


def _members(network: "Stoa", inputs: list[np.ndarray]) -> np.ndarray:
    """Return the objects of each trajectory [N, T, K]; none for a model without trajectories."""
    c, (_, boxes, classes, scores) = network.config, (x[0] for x in inputs)
    if not c.objects:
        return np.zeros((0, *classes.shape), bool)
    _, member = ops.select_trajectories(
        classes, scores, c.trajectories, choice=c.trajectory_choice, boxes=boxes
    )
    return np.asarray(member).reshape(-1, *classes.shape)


def _trajectory(
    clip: Prepared, kind: int, mine: np.ndarray, word: str | None, word_score: float
) -> Trajectory:
    """Follow the most confident object of a trajectory [T, K], as fractions of the frame."""
    best = np.where(mine, clip.scores, -np.inf).argmax(1)
    shown = np.asarray(mine.any(1))
    rows = np.arange(len(best))
    low, extent = clip.crop[:2], clip.crop[2:] - clip.crop[:2]
    boxes = clip.boxes[rows, best] * np.tile(extent, 2) + np.tile(low, 2)
    return Trajectory(
        clip.names[kind] if kind < len(clip.names) else str(kind),
        np.where(shown[:, None], boxes, 0).astype(np.float32),
        shown,
        float(clip.scores[rows, best][shown].mean()),
        word,
        word_score,
    )


def _score(scores: np.ndarray, column: int) -> float:
    return float(scores[column]) if column >= 0 else 0.0


def _word_at(model: Opened, text: str, end: int, column: int) -> str | None:
    """Return the word whose last piece is at a text position; None for Ø."""
    if column < 0 or column == end:
        return None
    from stoa_jax.text import clean

    position = 0
    for piece in model.tokenizer.pieces(text):
        position += len(piece.ids)
        if position >= column:
            return clean(text).lower()[piece.start : piece.end]
    return None


def _tagged(model: Opened, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Return where nouns and verbs of a text end, bool [L] each."""
    from stoa_jax.text import NOUN, VERB, parse

    parsed = parse(text, model.tokenizer, _tagger(), model.config.text_length)
    return parsed.tags == NOUN, parsed.tags == VERB


@functools.cache
def _tagger() -> "Tagger":
    from stoa_jax.text import Tagger

    return Tagger()
