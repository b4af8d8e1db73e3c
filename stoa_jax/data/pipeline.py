"""Batches of a split or a mixture: crops and captions are functions of (seed, position).

`order` maps positions to examples, `clips` decodes them, and this module crops each clip and writes
it to its row. No batch depends on the number of hosts, workers or devices, and the step is all that
is needed to resume.

B clips of the batch, T frames, K objects, L text tokens, S pixels.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags, logging

from stoa_jax.data import augment, clips, records
from stoa_jax.data.clips import BatchSpec
from stoa_jax.data.order import Examples, Order, Slot
from stoa_jax.data.split import Split, open_split
from stoa_jax.errors import UserError

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

    from stoa_jax.data.device_frames import DeviceFrames

__all__ = ["Batch", "BatchSpec", "Loader", "Split", "open_split"]

Batch = dict[str, np.ndarray]

ENDLESS = 2**40  # training steps


class Loader:
    """Host-local batches of one split, or of a weighted mixture.

    Training never ends and starts at `start_step`. Evaluation is one pass in order; rows that pad
    its last batch have `valid` False and `index` -1. Host p of P gets rows
    [p*B/P, (p+1)*B/P) of each global batch. `workers` processes read the clips, or `threads`
    threads of this process if `workers` is 0.

    `cache` decides whether decoded clips are kept: "auto" (in memory, if all of them take less than
    512 MB and there are no workers), "off", "memory", or "device". With "device", cropped frames
    stay on the accelerators and `to_devices` adds them to the batch there. Batches are the same in
    all cases.
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
        cache: clips.Cache = "auto",
        max_examples: int = 0,
    ):
        pairs = [(source, 1.0)] if isinstance(source, Split) else list(source)
        if not train and len(pairs) != 1:
            raise ValueError("evaluation reads one split, not a mixture")
        if batch_size % process_count:
            raise UserError(
                f"batch size {batch_size} is not divisible by {process_count} processes"
            )
        for split, weight in pairs:
            _check_fits(split, spec)
            if weight <= 0:
                raise UserError(f"data.sets: the weight of {split.dataset} is {weight}, not > 0")
        self.workers, self.prefetch, self.start_step = workers, prefetch, start_step
        splits = [split for split, _ in pairs]
        middle = not (train and spec.crop == "random")
        on_device = cache == "device" and spec.pixels
        if on_device and not middle:
            raise UserError("data.cache=device keeps cropped frames; set data.crop=center")
        keep = clips.keep_in_memory(cache, splits, spec, middle, workers)
        self._on_device = (splits, spec) if on_device else None
        self._device_frames: DeviceFrames | None = None
        self.batch_size = batch_size
        threads = threads or (1 if workers else min(16, os.cpu_count() or 1))
        self._threads = threads
        by_item = spec.texts and spec.kind != "caption"
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
            keep=keep,
            middle=middle,
            exact=not train,
            on_device=on_device,
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
            flags.FLAGS.mark_as_parsed()  # Grain reads absl flags, which only app.run parses
        steps = grain.MapDataset.range(self.start_step, stop).map(self._batches)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=max(1, self.prefetch))
        batches = steps.to_iter_dataset(options).mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=self.workers, per_worker_buffer_size=max(1, self.prefetch)
            )
        )
        return iter(batches)

    def _read_ahead(self, stop: int) -> Iterator[Batch]:
        """Yield the batches in order; a thread prepares `prefetch` of them in advance."""
        with concurrent.futures.ThreadPoolExecutor(1, "batches") as pool:
            ahead = collections.deque[concurrent.futures.Future[Batch]]()
            step = self.start_step
            while step < stop or ahead:
                while step < stop and len(ahead) <= max(1, self.prefetch):
                    ahead.append(pool.submit(self._batches, step))
                    step += 1
                yield ahead.popleft().result()

    def batch(self, step: int) -> Batch:
        """Compute the host-local batch of a step."""
        return self._batches(step)

    def to_devices(self, batch: Mapping[str, np.ndarray], mesh: "Mesh") -> dict[str, "jax.Array"]:
        """Assemble the global batch on a mesh, including frames that are kept there."""
        from stoa_jax import sharding

        placed = sharding.to_devices(batch, mesh, self.batch_size)
        if self._on_device is None:
            return placed
        from stoa_jax.data.device_frames import DeviceFrames

        if self._device_frames is None or self._device_frames.mesh != mesh:
            splits, spec = self._on_device
            self._device_frames = DeviceFrames(
                splits, spec, mesh, threads=self._threads, exact=not self.train
            )
        return self._device_frames.gather(placed)

    def close(self) -> None:
        """Release the frames on the devices."""
        self._device_frames = None


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
            "--detections=PATH to add them",
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


@dataclasses.dataclass
class _Batches:
    """The function from a step to its host-local batch; Grain maps it over the steps."""

    order: Order
    spec: BatchSpec
    batch_size: int
    rows: range
    threads: int
    keep: bool  # keep decoded clips in memory
    middle: bool  # every crop is the centre crop
    exact: bool  # the crop is exactly CLIP's, not the faster one of training
    on_device: bool  # frames are kept on the devices, and batches refer to them by `frame_row`

    def __post_init__(self) -> None:
        self._splits = [e.split for e in self.order.sets]
        self._answers = {answer: i for i, answer in enumerate(self.spec.answers)}
        self._decoded = self.spec  # the spec for decoding in this process
        if self.on_device:
            self._decoded = dataclasses.replace(self.spec, pixels=False)
        self._kept: list[clips.Kept] = []
        if self.keep:
            self._kept = [
                clips.kept_clips(s, self._decoded, self.middle, self.exact) for s in self._splits
            ]

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
            "valid": np.empty(count, bool),
            "index": np.empty(count, np.int32),
        }
        if spec.texts:
            batch["tokens"] = np.empty((count, *texts, spec.text_length), np.int32)
            batch["tags"] = np.empty((count, *texts, spec.text_length), np.int8)
        if self._decoded.pixels:
            batch["pixels"] = np.empty((count, t, s, s, 3), np.uint8)
        if self.on_device:
            batch["frame_row"] = np.empty(count, np.int32)
            if spec.flip:
                batch["mirrored"] = np.empty(count, bool)
        if spec.texts and spec.kind != "caption":
            batch["answer"] = np.empty(count, np.int32)
        # Group rows by clip: an evaluation may ask many questions about each.
        slots: dict[tuple[int, int], list[Slot]] = {}
        for row, global_row in enumerate(self.rows):
            slot = self.order.slot(row, step * self.batch_size + global_row)
            slots.setdefault((slot.which, slot.clip), []).append(slot)
        fill = functools.partial(self._fill, batch)
        # Kept clips without cropping are only copied, and threads would not speed that up.
        alone = self.threads == 1 or (self.middle and self._all_kept(slots))
        for _ in (map if alone else self._pool.map)(fill, slots.values()):
            pass
        return batch

    def _all_kept(self, slots: Iterable[tuple[int, int]]) -> bool:
        return self.keep and all(self._kept[which].has(clip) for which, clip in slots)

    def _fill(self, batch: Batch, slots: list[Slot]) -> None:
        """Write all examples of one clip into their rows of the batch."""
        which, index = slots[0].which, slots[0].clip
        in_place = None
        if self.keep:
            clip = self._kept[which][index]
        else:
            if "pixels" in batch and len(slots) == 1 and not (self.exact or self.spec.flip):
                in_place = batch["pixels"][slots[0].row]
            split, how = self._splits[which], (self.middle, self.exact, in_place)
            clip = clips.decode(split, index, self._decoded, *how)
        for slot in slots:
            self._write(batch, slot, clip, copy=in_place is None)

    def _write(self, batch: Batch, slot: Slot, clip: clips.Decoded, copy: bool) -> None:
        """Write an example into its row; without `copy`, the row already holds its centre crop."""
        spec, row, item, train = self.spec, slot.row, slot.item, self.order.train
        window, flip = None, False
        if spec.kind == "multiple_choice":
            texts = slice(item * records.OPTIONS, (item + 1) * records.OPTIONS)
        else:
            texts = max(item, 0)
        if train and (not self.middle or spec.flip or (item < 0 and len(clip.tokens) > 1)):
            rng = np.random.default_rng((self.order.seed, slot.position))
            if item < 0:
                texts = int(rng.integers(len(clip.tokens)))
            if not self.middle:
                window = augment.random_crop(rng, *clip.size)
            flip = spec.flip and rng.random() < 0.5 and not np.any(clip.sided[texts])
        if spec.texts:
            batch["tokens"][row] = clip.tokens[texts]
            batch["tags"][row] = clip.tags[texts]

        if window is not None:
            pixels = batch.get("pixels")
            if pixels is not None:
                augment.crop_frames(clip.frames, window, spec.image_size, flip, pixels[row])
            boxes, classes = augment.crop_boxes(clip.boxes, clip.classes, *clip.size, window, flip)
            boxes, classes, scores = augment.best_objects(boxes, classes, clip.scores, spec.objects)
        else:
            boxes, classes, scores = clip.boxes, clip.classes, clip.scores
            if flip:
                boxes = augment.mirror_boxes(boxes, classes)
            if "pixels" in batch and copy:
                augment.copy_frames(clip.frames, flip, batch["pixels"][row])
        batch["boxes"][row], batch["classes"][row], batch["scores"][row] = boxes, classes, scores
        if self.on_device:
            batch["frame_row"][row] = self._first_rows[slot.which] + slot.clip
            if spec.flip:
                batch["mirrored"][row] = flip

        batch["valid"][row] = slot.valid
        batch["index"][row] = slot.example if slot.valid else -1
        if not spec.texts:
            return
        if spec.kind == "qa":
            batch["answer"][row] = self._answers.get(clip.answers[item], -1)
        elif spec.kind == "multiple_choice":
            batch["answer"][row] = int(clip.answers[item])

    @functools.cached_property
    def _first_rows(self) -> list[int]:
        """Return the row of each set's first clip in the frames on the devices."""
        return [0, *np.cumsum([len(split) for split in self._splits]).tolist()]
