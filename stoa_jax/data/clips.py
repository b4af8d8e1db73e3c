"""Clips decoded for a model: read one from a split, crop it, and keep decoded ones in memory.

T frames, K objects, L text tokens, S pixels, n texts of the clip.
"""

import dataclasses
import re
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stoa_jax.data import augment, records, resize
from stoa_jax.data.split import Split, fit_tokens, one_line
from stoa_jax.errors import UserError

Cache = Literal["auto", "off", "memory", "device"]
CACHES = ("auto", "off", "memory", "device")
AUTO_BYTES = 512 * 2**20  # "auto" keeps decoded frames up to this size
_LEFT_OR_RIGHT = re.compile(rb"\b(left|right)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """What a task needs in its batches."""

    kind: records.Kind = "caption"
    frames: int = 12  # T
    image_size: int = 224  # S
    objects: int = 10  # K
    text_length: int = 32  # L
    vocab_size: int = 49408
    crop: str = "center"  # random, center
    flip: bool = False
    answers: tuple[str, ...] = ()  # QA: the answer classes, in order
    pixels: bool = True  # False: no pixels in batches; the frozen tower has run
    texts: bool = True  # False: no texts in batches, and every clip is one example


@dataclasses.dataclass
class Decoded:
    """A clip with its frames as pixels, either cropped to the centre or whole."""

    frames: Sequence[np.ndarray]  # T of uint8 [H, W, 3], or [S, S, 3] if `cropped`
    cropped: bool  # frames, boxes, classes and scores belong to the centre crop
    size: tuple[int, int]  # height and width before cropping
    boxes: np.ndarray  # [T, K, 4], xyxy as shares of the frame
    classes: np.ndarray  # [T, K]
    scores: np.ndarray  # [T, K]
    tokens: np.ndarray  # int32 [n, L]
    tags: np.ndarray  # int8 [n, L]
    sided: np.ndarray  # bool [n]: whether the text mentions left or right
    answers: list[str]


def decode(
    split: Split,
    index: int,
    spec: BatchSpec,
    middle: bool,
    exact: bool = True,
    out: np.ndarray | None = None,
) -> Decoded:
    """Read clip `index` of a split as `spec` asks; crop it to the centre if `middle`.

    The crop is exactly CLIP's if `exact`; else it lies on whole pixels and is resized by
    `resize.resample`, which is faster, into `out` [T, S, S, 3] if that is given.
    """
    taken = augment.frame_indices(split.frames, spec.frames)
    where = f"{split.directory}: clip {index} of {split.split!r}"
    try:
        record = split.read(index)
    except Exception as error:  # ArrayRecord and protobuf have different exceptions
        raise _damaged(where, error) from error
    frames = _Pictures([record["frames"][t] for t in taken] if spec.pixels else [], where)
    tokens, tags = fit_tokens(record["tokens"], record["tags"], spec.text_length, spec.vocab_size)
    clip = Decoded(
        frames=frames,
        cropped=False,
        size=frames[0].shape[:2] if frames else split.stored_size,
        boxes=record["boxes"][taken],
        classes=record["classes"][taken],
        scores=record["scores"][taken],
        tokens=tokens,
        tags=tags,
        sided=_sided(record),
        answers=[a.decode() for a in record["answers"]],
    )
    return _crop_middle(clip, spec, exact, out) if middle else clip


class _Pictures(Sequence[np.ndarray]):
    """Frames that are decoded when they are looked at, so that one after the other is in the cache.

    Looking twice decodes twice, except for the first frame, which also gives the size.
    """

    def __init__(self, jpegs: Sequence[bytes], where: str):
        self._jpegs, self._where = jpegs, where
        self._first = self._decode(0) if jpegs else None

    def __len__(self) -> int:
        return len(self._jpegs)

    def __getitem__(self, t: Any) -> Any:
        if isinstance(t, slice):
            return [self[i] for i in range(*t.indices(len(self)))]
        return self._first if t == 0 and self._jpegs else self._decode(t)

    def _decode(self, t: int) -> np.ndarray:
        try:
            return records.decode_jpeg(self._jpegs[t])
        except ValueError as error:
            raise _damaged(self._where, error) from error


def _damaged(where: str, error: Exception) -> UserError:
    return UserError(f"{where} is damaged ({one_line(error)}); build again with --overwrite")


def _crop_middle(clip: Decoded, spec: BatchSpec, exact: bool, out: np.ndarray | None) -> Decoded:
    size = spec.image_size
    if exact:
        crop = resize.center_crop(*clip.size, size)
        frames = [resize.resize_and_crop(frame, size) for frame in clip.frames]
    else:
        crop = resize.center_window(*clip.size, size)
        if out is None:
            out = np.empty((len(clip.frames), size, size, 3), np.uint8)
        augment.crop_frames(clip.frames, crop, size, False, out)
        frames = out
    boxes, classes = augment.crop_boxes(clip.boxes, clip.classes, *clip.size, crop, False)
    best = augment.best_objects(boxes, classes, clip.scores, spec.objects)
    return dataclasses.replace(
        clip, frames=frames, cropped=True, boxes=best[0], classes=best[1], scores=best[2]
    )


def _sided(record: Mapping[str, Any]) -> np.ndarray:
    """Return which texts, or their answers, mention left or right: bool [n]."""
    texts, answers = record["texts"], record["answers"]
    if len(answers) == len(texts):
        texts = [b"%b %b" % pair for pair in zip(texts, answers, strict=True)]
    return np.array([bool(_LEFT_OR_RIGHT.search(text)) for text in texts])


class Kept:
    """Decoded clips of a split, kept after their first use.

    The frames of all clips are one array: [clips, T, S, S, 3] if they are cropped to the centre,
    else [clips, T, H, W, 3] as stored. A clip of another stored size keeps its own array.
    """

    def __init__(self, split: Split, spec: BatchSpec, middle: bool, exact: bool):
        # Holds no reference to the split: `kept_clips` looks up by a weak reference to the split.
        self._split, self._spec = weakref.ref(split), spec
        self._middle, self._exact = middle, exact
        height, width = (spec.image_size,) * 2 if middle else split.stored_size
        frames = spec.frames if spec.pixels else 0
        self.frames = np.empty((len(split), frames, height, width, 3), np.uint8)
        self._clips: list[Decoded | None] = [None] * len(split)

    def has(self, index: int) -> bool:
        """Return whether a clip has been decoded."""
        return self._clips[index] is not None

    def __getitem__(self, index: int) -> Decoded:
        found = self._clips[index]
        return self._decode(index) if found is None else found

    def _decode(self, index: int) -> Decoded:
        split = self._split()
        assert split is not None, "a loader outlived its split"
        clip = decode(split, index, self._spec, self._middle, self._exact)
        clip.frames = list(clip.frames)
        if all(frame.shape == self.frames.shape[2:] for frame in clip.frames):
            if clip.frames:
                np.stack(clip.frames, out=self.frames[index])
            clip.frames = self.frames[index]
        self._clips[index] = clip  # written last: another thread may read it meanwhile
        return clip


# Split -> its kept clips, so that all evaluations of a run share one decoding.
_KEPT: weakref.WeakKeyDictionary[Split, dict[tuple, Kept]] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def kept_clips(split: Split, spec: BatchSpec, middle: bool, exact: bool = True) -> Kept:
    """Return the kept clips of a split for this spec; all loaders of the split share them."""
    key = (
        *(spec.frames, spec.image_size, spec.objects, spec.text_length, spec.vocab_size),
        *(spec.pixels, middle, exact),
    )
    with _LOCK:
        by_spec = _KEPT.setdefault(split, {})
        if key not in by_spec:
            by_spec[key] = Kept(split, spec, middle, exact)
        return by_spec[key]


def keep_in_memory(
    mode: Cache, splits: Sequence[Split], spec: BatchSpec, middle: bool, workers: int
) -> bool:
    """Decide whether a loader keeps its decoded clips; raise UserError if it cannot."""
    if mode not in CACHES:
        raise UserError(f"data.cache is {mode!r}; choose one of {', '.join(CACHES)}")
    if mode == "off" or (mode == "auto" and workers):
        return False
    if workers:
        raise UserError(
            f"data.cache={mode} keeps clips in this process, and data.workers={workers} reads in "
            "others; set data.workers=0"
        )
    if mode == "device":
        return True  # only the rest of a clip is kept in memory
    needed = sum(_bytes_of(split, spec, middle) for split in splits)
    if mode == "auto":
        return needed <= AUTO_BYTES
    free = _free_bytes()
    if free is not None and needed > free:
        raise UserError(
            f"data.cache=memory: the decoded clips of {', '.join(s.dataset for s in splits)} need "
            f"{needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free; set data.cache=off"
        )
    return True


def _bytes_of(split: Split, spec: BatchSpec, middle: bool) -> int:
    height, width = (spec.image_size,) * 2 if middle else split.stored_size
    return len(split) * (spec.frames if spec.pixels else 0) * height * width * 3


def _free_bytes() -> int | None:
    """Return the available memory in bytes, or None if the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:")), None)
