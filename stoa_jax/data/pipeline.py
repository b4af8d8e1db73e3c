"""From ArrayRecord files to batches: crops and captions are functions of (seed, position).

`order` says which example stands at a position, here it is read, cropped and put in its row. So
nothing of a batch depends on the number of hosts, workers and devices, and the step alone is the
state to resume from.

B clips of the batch, T frames, K objects, L text tokens, S pixels.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags, logging

from stoa_jax.data import augment, records, resize
from stoa_jax.data.order import Examples, Order, Place
from stoa_jax.data.split import Split, fit_tokens, one_line, open_split
from stoa_jax.errors import UserError

__all__ = ["Batch", "BatchSpec", "Loader", "Split", "open_split"]

Batch = dict[str, np.ndarray]

CACHE_BYTES = 512 * 2**20  # decoded frames up to this are kept in memory by default
ENDLESS = 2**40  # training steps
_LEFT_OR_RIGHT = re.compile(rb"\b(left|right)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """What a task wants of its batches."""

    kind: records.Kind = "caption"
    frames: int = 12  # T
    image_size: int = 224  # S
    objects: int = 10  # K
    text_length: int = 32  # L
    vocab_size: int = 49408
    crop: str = "center"  # random, center
    flip: bool = False
    answers: tuple[str, ...] = ()  # QA: the classes, in order
    pixels: bool = True  # without, batches have none: what a frozen tower said of them is kept
    all_texts: bool = False  # every text of a clip is an example, not one of them


class Loader:
    """Iterates the host-local batches of one split, or of a weighted mixture.

    Training never ends and starts at `start_step`. Evaluation is one pass in order; the rows that
    fill its last batch have `valid` False and `index` -1. Host p of P gets rows
    [p*B/P, (p+1)*B/P) of each global batch. With `workers` the reading is done by that many
    processes, without by `threads` threads of this one.
    """

    def __init__(
        self,
        source: Split | Sequence[tuple[Split, float]],
        spec: BatchSpec,
        batch_size: int,
        seed: int = 0,
        train: bool = True,
        process_index: int = 0,
        process_count: int = 1,
        workers: int = 0,
        start_step: int = 0,
        *,
        prefetch: int = 2,
        threads: int | None = None,
        cache: bool | None = None,
        max_examples: int = 0,
    ):
        pairs = [(source, 1.0)] if isinstance(source, Split) else list(source)
        if not train and len(pairs) != 1:
            raise ValueError("evaluation reads one split, not a mixture")
        if batch_size % process_count:
            raise UserError(
                f"batch size {batch_size} does not divide among {process_count} processes"
            )
        for split, weight in pairs:
            _check_fits(split, spec)
            if weight <= 0:
                raise UserError(f"data.sets: the weight of {split.dataset} is {weight}, not > 0")
        self.workers, self.prefetch, self.start_step = workers, prefetch, start_step
        if cache is None:
            cache = workers == 0 and sum(_decoded_bytes(s, spec) for s, _ in pairs) <= CACHE_BYTES
        threads = threads or (1 if workers else min(16, os.cpu_count() or 1))
        by_item = spec.kind != "caption" or spec.all_texts
        order = Order(
            sets=[Examples(split, by_item) for split, _ in pairs],
            weights=[weight for _, weight in pairs],
            seed=seed,
            train=train,
            limit=max_examples,
        )
        self._batches = _Batches(
            order=order,
            spec=spec,
            batch_size=batch_size,
            rows=range(
                process_index * batch_size // process_count,
                (process_index + 1) * batch_size // process_count,
            ),
            threads=threads,
            cache=cache,
        )
        self.num_examples = order.length
        self.steps_per_epoch = -(-self.num_examples // batch_size)
        if train:
            self.steps_per_epoch = max(1, self.num_examples // batch_size)
        self.train = train

    def __iter__(self) -> Iterator[Batch]:
        stop = ENDLESS if self.train else self.steps_per_epoch
        if not self.workers:
            return self._read_ahead(stop)
        import grain

        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads absl flags, also where no app.run was
        steps = grain.MapDataset.range(self.start_step, stop).map(self._batches)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=max(1, self.prefetch))
        batches = steps.to_iter_dataset(options).mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=self.workers, per_worker_buffer_size=max(1, self.prefetch)
            )
        )
        return iter(batches)

    def _read_ahead(self, stop: int) -> Iterator[Batch]:
        """The batches in order; a thread makes `prefetch` of them before they are asked for."""
        with concurrent.futures.ThreadPoolExecutor(1, "batches") as pool:
            ahead = collections.deque[concurrent.futures.Future[Batch]]()
            step = self.start_step
            while step < stop or ahead:
                while step < stop and len(ahead) <= max(1, self.prefetch):
                    ahead.append(pool.submit(self._batches, step))
                    step += 1
                yield ahead.popleft().result()

    def batch(self, step: int) -> Batch:
        """The host-local batch of a step, made here and now."""
        return self._batches(step)


def _check_fits(split: Split, spec: BatchSpec) -> None:
    if split.kind != spec.kind:
        raise UserError(
            f"{split.dataset} holds items of kind {split.kind!r}, and the task reads {spec.kind!r}"
        )
    for name, asked, stored in (
        ("frames", spec.frames, split.frames),
        ("objects", spec.objects, split.objects),
    ):
        if asked > stored:
            raise UserError(
                f"{split.directory} stores {stored} {name} a "
                f"{'clip' if name == 'frames' else 'frame'} and the model reads {asked}; lower "
                f"the model's, or build again with --{name}={asked}"
            )
    if not split.class_names:
        logging.warning(
            "%s has no detections: objects are padding in training and evaluation; build with "
            "--detections=PATH to have them",
            split.dataset,
        )
    if spec.image_size > min(split.stored_size):
        logging.warning(
            "%s: frames are stored at %dx%d and enlarged to %d; build with --short-side=%d",
            split.dataset,
            *split.stored_size[::-1],
            spec.image_size,
            spec.image_size,
        )


def _decoded_bytes(split: Split, spec: BatchSpec) -> int:
    height, width = split.stored_size
    return len(split) * spec.frames * height * width * 3


@dataclasses.dataclass
class _Batches:
    """step -> the host-local batch. A pure function, which Grain maps over the steps."""

    order: Order
    spec: BatchSpec
    batch_size: int
    rows: range
    threads: int
    cache: bool

    def __post_init__(self) -> None:
        self._splits = [e.split for e in self.order.sets]
        self._kept = [augment.frame_indices(s.frames, self.spec.frames) for s in self._splits]
        self._answers = {answer: i for i, answer in enumerate(self.spec.answers)}
        self._clips: dict[tuple[int, int], dict[str, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    @functools.cached_property
    def _pool(self) -> concurrent.futures.ThreadPoolExecutor:
        return concurrent.futures.ThreadPoolExecutor(self.threads)

    def __call__(self, step: int) -> Batch:
        spec, count = self.spec, len(self.rows)
        t, k, s = spec.frames, spec.objects, spec.image_size
        texts = (records.OPTIONS,) if spec.kind == "multiple_choice" else ()
        batch = {
            "boxes": np.empty((count, t, k, 4), np.float32),
            "classes": np.empty((count, t, k), np.int32),
            "scores": np.empty((count, t, k), np.float32),
            "tokens": np.empty((count, *texts, spec.text_length), np.int32),
            "tags": np.empty((count, *texts, spec.text_length), np.int8),
            "valid": np.empty(count, bool),
            "index": np.empty(count, np.int32),
        }
        if spec.pixels:
            batch["pixels"] = np.empty((count, t, s, s, 3), np.uint8)
        if spec.kind != "caption":
            batch["answer"] = np.empty(count, np.int32)
        if spec.all_texts:
            batch["clip"] = np.empty(count, np.int32)
        # Rows of one clip together: an evaluation asks many questions of each.
        places: dict[tuple[int, int], list[Place]] = {}
        for row, global_row in enumerate(self.rows):
            place = self.order.place(row, step * self.batch_size + global_row)
            places.setdefault((place.which, place.clip), []).append(place)
        fill = functools.partial(self._fill, batch)
        for _ in (map if self.threads == 1 else self._pool.map)(fill, places.values()):
            pass
        return batch

    def _fill(self, batch: Batch, places: list[Place]) -> None:
        """Writes all examples of one clip into their rows of the batch."""
        clip = self._clip(places[0].which, places[0].clip)
        for place in places:
            self._write(batch, place, clip)

    def _write(self, batch: Batch, place: Place, clip: dict[str, Any]) -> None:
        spec, row, item = self.spec, place.row, place.item
        rng = np.random.default_rng((self.order.seed, place.position))
        if spec.kind == "multiple_choice":
            texts = slice(item * records.OPTIONS, (item + 1) * records.OPTIONS)
        elif item >= 0:
            texts = item
        else:
            texts = int(rng.integers(len(clip["tokens"]))) if self.order.train else 0
        batch["tokens"][row] = clip["tokens"][texts]
        batch["tags"][row] = clip["tags"][texts]

        height, width = clip["size"]
        random = self.order.train and spec.crop == "random"
        window = augment.random_crop(rng, height, width) if random else None
        flip = bool(self.order.train and spec.flip and rng.random() < 0.5)
        flip = flip and not np.any(clip["sided"][texts])
        if spec.pixels:
            out = batch["pixels"][row]
            augment.crop_frames(clip["frames"], window, spec.image_size, flip, out)
        crop = window or resize.center_crop(height, width, spec.image_size)
        boxes, classes = augment.crop_boxes(
            clip["boxes"], clip["classes"], height, width, crop, flip
        )
        best = augment.best_objects(boxes, classes, clip["scores"], spec.objects)
        batch["boxes"][row], batch["classes"][row], batch["scores"][row] = best

        batch["valid"][row] = place.valid
        batch["index"][row] = place.example if place.valid else -1
        if spec.all_texts:
            batch["clip"][row] = place.clip if place.valid else -1
        if spec.kind == "qa":
            batch["answer"][row] = self._answers.get(clip["answers"][item], -1)
        elif spec.kind == "multiple_choice":
            batch["answer"][row] = int(clip["answers"][item])

    def _clip(self, which: int, index: int) -> dict[str, Any]:
        """A record cut to the spec and decoded; kept, with the cache on."""
        if (which, index) in self._clips:
            return self._clips[which, index]
        spec, split = self.spec, self._splits[which]
        try:
            record = split.read(index)
            read = self._kept[which] if spec.pixels else []
            stored = [records.decode_jpeg(record["frames"][t]) for t in read]
        except Exception as error:
            raise UserError(
                f"{split.directory}: clip {index} of {split.split!r} is damaged "
                f"({one_line(error)}); build again with --overwrite"
            ) from error
        kept = self._kept[which]
        tokens, tags = fit_tokens(
            record["tokens"], record["tags"], spec.text_length, spec.vocab_size
        )
        clip = {
            "frames": stored,
            "size": stored[0].shape[:2] if stored else split.stored_size,
            "boxes": record["boxes"][kept],
            "classes": record["classes"][kept],
            "scores": record["scores"][kept],
            "tokens": tokens,
            "tags": tags,
            "sided": _sided(record),
            "answers": [a.decode() for a in record["answers"]],
        }
        if self.cache:
            self._clips[which, index] = clip
        return clip


def _sided(record: Mapping[str, Any]) -> np.ndarray:
    """Which texts of a clip speak of left or right, in their answer perhaps; bool [n]."""
    texts, answers = record["texts"], record["answers"]
    if len(answers) == len(texts):
        texts = [b"%b %b" % pair for pair in zip(texts, answers, strict=True)]
    return np.array([bool(_LEFT_OR_RIGHT.search(text)) for text in texts])
