"""The synthetic world: clips that stand in for real data on any machine.

Coloured and textured shapes move in ways that a single frame does not show. Everything about clip
i is a function of (seed, split, i), independent of order and process. Clips come in groups of
`siblings` that look alike and differ in what happens.

T frames, S side in pixels, n objects of the scene, K detected objects per frame.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from stoa_jax.data.synthetic import language, motion, pictures, render, scene
from stoa_jax.data.synthetic.scene import Scene
from stoa_jax.errors import UserError

if TYPE_CHECKING:
    from stoa_jax.data.records import Clip

CLASS_NAMES: tuple[str, ...] = scene.SHAPES
KINDS = ("captions", "qa", "multiple_choice", "pictures")
_LOOKS, _COURSE, _PICTURE = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class SyntheticClip:
    """A clip with its ground truth and the output of a detector."""

    video_id: str
    frames: np.ndarray  # [T, S, S, 3] uint8
    true_boxes: np.ndarray  # [T, n, 4] float32 xyxy in [0, 1] of the visible part, or 0
    true_classes: np.ndarray  # [T, n] int32; -1 if nothing is visible
    boxes: np.ndarray  # [T, K, 4] float32, best first
    classes: np.ndarray  # [T, K] int32; -1 is padding
    scores: np.ndarray  # [T, K] float32
    program: dict  # objects, background, motions
    captions: list[str] = dataclasses.field(default_factory=list)
    questions: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    choices: tuple[Sequence[str], int] = ((), 0)  # five options and the index of the true one


class World:
    """Random access to the infinite clips of a split."""

    def __init__(
        self,
        split: str,
        seed: int = 0,
        size: int = 64,
        frames: int = 12,
        max_objects: int = 4,
        objects: int = 10,
        siblings: int = 2,
        twins: int = 0,
    ):
        if split not in scene.SPLITS:
            raise UserError(f"synthetic split {split!r}: choose one of {', '.join(scene.SPLITS)}")
        for name, value, low, high in (
            ("size", size, 16, 1024),
            ("frames", frames, 1, 1024),
            ("max_objects", max_objects, 2 if twins else 1, scene.MOST_THINGS),
            ("objects", objects, max_objects, 1024),
            ("siblings", siblings, 1, 8),
            ("twins", twins, 0, 1),
        ):
            if not low <= value <= high:
                raise UserError(f"synthetic {name}={value}: choose from {low} to {high}")
        self.split, self.seed, self.size, self.frames = split, seed, size, frames
        self.max_objects, self.objects, self.siblings = max_objects, objects, siblings
        self.twins = bool(twins)  # two objects of one class in every clip

    def scene(self, index: int) -> Scene:
        """Return the program of clip `index` without rendering it."""
        number, member = divmod(index, self.siblings)
        rng = self._rng(_LOOKS, number)
        group = scene.draw_group(rng, self.split, self.siblings, self.max_objects, self.twins)
        return group[member]

    def clip(self, index: int) -> SyntheticClip:
        """Render clip `index`."""
        program, rng = self.scene(index), self._rng(_COURSE, index)
        seen = self._seen(index, program, rng)
        return dataclasses.replace(
            seen,
            captions=language.captions(program, rng),
            questions=language.questions(program, rng),
            choices=language.choices(program, rng),
        )

    def picture(self, index: int) -> SyntheticClip:
        """Render picture `index`: objects at rest, captions that name them all, no questions."""
        rng = self._rng(_PICTURE, index)
        program = pictures.draw_picture(rng, self.split, self.max_objects)
        seen = self._seen(index, program, rng)
        return dataclasses.replace(seen, captions=pictures.captions(program, rng))

    def _seen(self, index: int, program: Scene, rng: np.random.Generator) -> SyntheticClip:
        """Render a program and detect its objects, without texts."""
        tracks = motion.lay_out(program, self.frames, rng)
        frames, true_boxes, share = render.draw(program, tracks, self.size, rng)
        shapes = np.array([CLASS_NAMES.index(t.shape) for t in program.things], np.int32)
        true_classes = np.where(share > 0, shapes, -1).astype(np.int32)
        boxes, classes, scores = detect(true_boxes, true_classes, share, self.objects, rng)
        return SyntheticClip(
            video_id=f"{self.split}-{self.seed}-{index:06d}",
            frames=frames,
            true_boxes=true_boxes,
            true_classes=true_classes,
            boxes=boxes,
            classes=classes,
            scores=scores,
            program=program.as_dict(),
        )

    def _rng(self, stream: int, index: int) -> np.random.Generator:
        split = scene.SPLITS.index(self.split)
        return np.random.default_rng(np.random.SeedSequence([self.seed, split, stream, index]))


def detect(
    true_boxes: np.ndarray,
    true_classes: np.ndarray,
    share: np.ndarray,
    objects: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Simulate a detector on exact boxes [T, n, 4]: boxes, classes, scores [T, K, …].

    It misses mostly small and hidden objects, shifts boxes, confuses a class now and then, and
    reports objects that do not exist, each with plausible confidence.
    """
    length = len(true_classes)
    side = np.sqrt(np.prod(true_boxes[..., 2:] - true_boxes[..., :2], -1))
    ease = np.clip(side / 0.2, 0.3, 1.0) * share  # [T, n]
    seen = (true_classes >= 0) & (rng.random(ease.shape) < 0.35 + 0.62 * ease**0.5)
    boxes = true_boxes + rng.normal(0, 0.05, true_boxes.shape) * side[..., None]
    wrong = rng.random(ease.shape) < 0.03
    other = (true_classes + rng.integers(1, len(CLASS_NAMES), ease.shape)) % len(CLASS_NAMES)
    classes = np.where(wrong, other, true_classes)
    scores = 0.3 + 0.62 * ease + rng.normal(0, 0.06, ease.shape) - 0.25 * wrong
    # one false positive per frame, usually with low confidence
    corner, extent = rng.uniform(0, 0.75, (length, 1, 2)), rng.uniform(0.1, 0.25, (length, 1, 2))
    ghosts = np.concatenate([corner, corner + extent], -1)
    boxes = np.clip(np.concatenate([boxes, ghosts], 1), 0, 1)
    classes = np.concatenate([classes, rng.integers(0, len(CLASS_NAMES), (length, 1))], 1)
    scores = np.concatenate([scores, rng.uniform(0.1, 0.35, (length, 1))], 1)
    seen = np.concatenate([seen, rng.random((length, 1)) < 0.1], 1)
    seen &= (boxes[..., 2:] > boxes[..., :2]).all(-1)
    scores = np.where(seen, np.clip(scores, 0.05, 0.99), 0)

    order = np.argsort(-scores, 1, kind="stable")[:, :objects]
    out_boxes = np.zeros((length, objects, 4), np.float32)
    out_classes = np.full((length, objects), -1, np.int32)
    out_scores = np.zeros((length, objects), np.float32)
    kept = np.take_along_axis(seen, order, 1)
    width = order.shape[1]
    taken = np.take_along_axis(boxes, order[..., None], 1)
    out_boxes[:, :width] = np.where(kept[..., None], taken, 0)
    out_classes[:, :width] = np.where(kept, np.take_along_axis(classes, order, 1), -1)
    out_scores[:, :width] = np.where(kept, np.take_along_axis(scores, order, 1), 0)
    return out_boxes, out_classes, out_scores


def as_clip(synthetic: SyntheticClip, kind: str) -> "Clip":
    """Convert the clip to what a source of one of `KINDS` yields."""
    from stoa_jax.data.records import Clip  # imports TFDS, which rendering does not need

    if kind in ("captions", "pictures"):
        texts, answers = list(synthetic.captions), []
    elif kind == "qa":
        texts = [question for question, _ in synthetic.questions]
        answers = [answer for _, answer in synthetic.questions]
    elif kind == "multiple_choice":
        options, right = synthetic.choices
        texts, answers = list(options), [str(right)]
    else:
        raise UserError(f"synthetic/{kind}: the kinds are {', '.join(KINDS)}")
    return Clip(
        synthetic.video_id,
        list(synthetic.frames),
        synthetic.boxes,
        synthetic.classes,
        synthetic.scores,
        texts,
        answers,
    )
