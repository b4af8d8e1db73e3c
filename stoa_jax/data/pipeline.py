"""From ArrayRecord files to batches: order, crops and captions are functions of (seed, position).

The *position* of an example in training is `step * batch_size + row`, over the whole run and all
hosts. Nothing else decides what stands there, so the number of hosts, workers and devices changes
nothing, and the step alone is the state to resume from.

B clips of the batch, T frames, K objects, L text tokens, S pixels.
"""

import bisect
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
import tensorflow_datasets as tfds
from absl import flags, logging

from stoa_jax.data import augment, records
from stoa_jax.errors import UserError

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
    all_texts: bool = False  # every text of a clip is an example, not one of them


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What is known of a clip without its frames."""

    video_id: str
    texts: tuple[str, ...]
    answers: tuple[str, ...]


class Split:
    """One split of a built data set, by index. Opens its files when first read; can be pickled."""

    def __init__(self, directory: Path, dataset: str, split: str):
        self.directory, self.dataset, self.split = Path(directory), dataset, split
        self._info = tfds.builder_from_directory(self.directory).info
        frames, objects, _ = self._info.features["boxes"].shape
        self.frames, self.objects = frames, objects
        self.class_names = records.read_class_names(self.directory)

    def __len__(self) -> int:
        return self._info.splits[self.split].num_examples

    def __getstate__(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in ("directory", "dataset", "split")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    @functools.cached_property
    def _source(self):
        builder = tfds.builder_from_directory(self.directory)
        return builder.as_data_source(self.split)

    @functools.cached_property
    def _listed(self) -> list[Metadata]:
        listed = list(read_metadata(self.directory, self.split))
        if not listed:  # `tfds build` writes no lists
            listed = [_metadata(self.read(i)) for i in range(len(self))]
        if len(listed) != len(self):
            raise UserError(
                f"{self.directory}/clips lists {len(listed)} clips of {self.split!r} where there "
                f"are {len(self)}; build again with --overwrite"
            )
        return listed

    def read(self, i: int) -> dict[str, Any]:
        """Record i as stored: arrays, JPEG bytes, UTF-8 bytes."""
        return self._source[i]

    def metadata(self, i: int) -> Metadata:
        """Id, texts and answers of clip i; its frames stay closed."""
        return self._listed[i]

    def tokens(
        self, i: int, length: int = records.TEXT_LENGTH, vocab_size: int = records.END + 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [n, length] int32 and tags [n, length] int8 of all texts of clip i."""
        record = self.read(i)
        return fit_tokens(record["tokens"], record["tags"], length, vocab_size)

    @functools.cached_property
    def kind(self) -> records.Kind:
        """Whether its texts are captions, questions or options."""
        first = _metadata(self.read(0))
        return records.kind_of(first.texts, first.answers)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of all ids, texts and answers, in order."""
        path = self.directory / "build.json"
        if path.exists():
            return json.loads(path.read_text())["fingerprints"][self.split]
        return fingerprint(self._listed)

    @functools.cached_property
    def stored_size(self) -> tuple[int, int]:
        """(height, width) of the first clip's frames."""
        return records.decode_jpeg(self.read(0)["frames"][0]).shape[:2]


def _sided(record: Mapping[str, Any]) -> np.ndarray:
    """Which texts of a clip speak of left or right, in their answer perhaps; bool [n]."""
    texts, answers = record["texts"], record["answers"]
    if len(answers) == len(texts):
        texts = [b"%b %b" % pair for pair in zip(texts, answers, strict=True)]
    return np.array([bool(_LEFT_OR_RIGHT.search(text)) for text in texts])


def _metadata(record: Mapping[str, Any]) -> Metadata:
    texts, answers = ([t.decode() for t in record[k]] for k in ("texts", "answers"))
    return Metadata(record["video_id"].decode(), tuple(texts), tuple(answers))


def read_metadata(directory: Path, split: str) -> Iterator[Metadata]:
    """The clips of a split as `stoa_jax.data.build` lists them beside its shards."""
    for path in sorted((directory / "clips").glob(f"{split}-{'[0-9]' * 5}-of-*.jsonl")):
        with open(path, encoding="utf-8") as file:
            next(file)  # the shard's own line
            for line in file:
                row = json.loads(line)
                yield Metadata(row["video_id"], tuple(row["texts"]), tuple(row["answers"]))


def fingerprint(clips: Iterable[Metadata]) -> str:
    """A hash over `Metadata` rows; two sets with the same one hold the same clips and texts."""
    digest = hashlib.sha256()
    for clip in clips:
        row = [clip.video_id, list(clip.texts), list(clip.answers)]
        digest.update(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
    return digest.hexdigest()[:16]


def open_split(data_dir: str | os.PathLike[str], dataset: str, split: str) -> Split:
    """A split of a data set that `stoa_jax.data.build` or `tfds build` made under `data_dir`."""
    directory = dataset_directory(data_dir, dataset)
    if directory is None:
        option = "" if dataset.startswith("synthetic/") else " --manual-dir=DIR"
        raise UserError(
            f"data set {dataset!r} is not in {data_dir}; build it: "
            f"python -m stoa_jax.data.build {dataset}{option} --data-dir={data_dir}"
        )
    try:
        splits = tfds.builder_from_directory(directory).info.splits
    except Exception as error:
        raise UserError(f"{directory}: unreadable data set ({_line(error)}); build again") from None
    if split not in splits:
        raise UserError(f"{dataset} has no split {split!r}; it has {', '.join(sorted(splits))}")
    if not splits[split].num_examples:
        raise UserError(f"{dataset}: the split {split!r} holds no clips; see failures.jsonl there")
    return Split(directory, dataset, split)


def dataset_directory(data_dir: str | os.PathLike[str], dataset: str) -> Path | None:
    """Where the newest version of a data set lies; None when it was not built."""
    root = Path(data_dir).expanduser() / dataset
    found = [path.parent for path in root.glob("*/dataset_info.json") if _version(path.parent)]
    return max(found, key=_version) if found else None


def _version(path: Path) -> tuple[int, ...]:
    parts = path.name.split(".")
    return tuple(map(int, parts)) if all(p.isdigit() for p in parts) else ()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def fit_tokens(
    tokens: np.ndarray, tags: np.ndarray, length: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Stored tokens [n, 77] in a vocabulary and a length; a cut text ends in its end token."""
    if vocab_size <= records.END:
        from stoa_jax import text

        tokens, tags = text.restrict(tokens, tags, vocab_size)
    tokens = np.array(tokens[:, :length], np.int32)
    tags = np.array(tags[:, :length], np.int8)
    cut = ~(tokens == vocab_size - 1).any(1)
    tokens[cut, -1] = vocab_size - 1
    tags[cut, -1] = 0
    return tokens, tags


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
        self._batches = _Batches(
            examples=[_Examples(split, spec) for split, _ in pairs],
            weights=[weight for _, weight in pairs],
            spec=spec,
            batch_size=batch_size,
            seed=seed,
            train=train,
            rows=range(
                process_index * batch_size // process_count,
                (process_index + 1) * batch_size // process_count,
            ),
            threads=threads,
            cache=cache,
            limit=max_examples,
        )
        self.num_examples = self._batches.length
        self.steps_per_epoch = -(-self.num_examples // batch_size)
        if train:
            self.steps_per_epoch = max(1, self.num_examples // batch_size)
        self.train = train

    def __iter__(self) -> Iterator[Batch]:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads absl flags, also where no app.run was
        stop = ENDLESS if self.train else self.steps_per_epoch
        steps = grain.MapDataset.range(self.start_step, stop).map(self._batches)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=max(1, self.prefetch))
        batches = steps.to_iter_dataset(options)
        if self.workers:
            batches = batches.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=self.workers, per_worker_buffer_size=max(1, self.prefetch)
                )
            )
        return iter(batches)

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


class _Examples:
    """The examples of a split: clips, or the items (questions, choices, captions) of all clips."""

    def __init__(self, split: Split, spec: BatchSpec):
        self.split = split
        self.by_item = spec.kind != "caption" or spec.all_texts
        if self.by_item:
            counts = [
                len(m.answers or m.texts) for m in (split.metadata(i) for i in range(len(split)))
            ]
            self.ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.by_item else len(self.split)

    def locate(self, i: int) -> tuple[int, int]:
        """(clip, item) of example i; item -1 where the clip is the example."""
        if not self.by_item:
            return i, -1
        clip = int(np.searchsorted(self.ends, i, "right"))
        return clip, i - (int(self.ends[clip - 1]) if clip else 0)


class _Place(NamedTuple):
    """A row of the batch, and which example belongs there."""

    row: int
    position: int
    valid: bool
    example: int
    which: int  # of the sets
    clip: int
    item: int  # of the clip; -1: any


@dataclasses.dataclass
class _Batches:
    """step -> the host-local batch. A pure function, which Grain maps over the steps."""

    examples: list[_Examples]
    weights: list[float]
    spec: BatchSpec
    batch_size: int
    seed: int
    train: bool
    rows: range
    threads: int
    cache: bool
    limit: int = 0

    def __post_init__(self) -> None:
        lengths = [len(e) for e in self.examples]
        self._starts = [0, *np.cumsum(lengths).tolist()]
        self.length = self._starts[-1]
        if self.limit and not self.train:
            self.length = min(self.length, self.limit)
        self._kept = [
            augment.frame_indices(e.split.frames, self.spec.frames) for e in self.examples
        ]
        self._answers = {answer: i for i, answer in enumerate(self.spec.answers)}
        self._clips: dict[tuple[int, int], dict[str, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    @functools.cached_property
    def _order(self) -> grain.MapDataset:
        """position -> example index, for training: each set shuffled anew every epoch, mixed."""
        # Grain adds the epoch to a seed, so neighbouring seeds must not be neighbours there.
        seeds = np.random.SeedSequence(self.seed).generate_state(len(self.examples))
        sets = [
            grain.MapDataset.range(start, end).shuffle(seed=int(seed)).repeat()
            for seed, start, end in zip(seeds, self._starts, self._starts[1:], strict=False)
        ]
        return sets[0] if len(sets) == 1 else grain.MapDataset.mix(sets, self.weights)

    @functools.cached_property
    def _pool(self) -> concurrent.futures.ThreadPoolExecutor:
        return concurrent.futures.ThreadPoolExecutor(self.threads)

    def __call__(self, step: int) -> Batch:
        spec, count = self.spec, len(self.rows)
        t, k, s = spec.frames, spec.objects, spec.image_size
        texts = (records.OPTIONS,) if spec.kind == "multiple_choice" else ()
        batch = {
            "pixels": np.empty((count, t, s, s, 3), np.uint8),
            "boxes": np.empty((count, t, k, 4), np.float32),
            "classes": np.empty((count, t, k), np.int32),
            "scores": np.empty((count, t, k), np.float32),
            "tokens": np.empty((count, *texts, spec.text_length), np.int32),
            "tags": np.empty((count, *texts, spec.text_length), np.int8),
            "valid": np.empty(count, bool),
            "index": np.empty(count, np.int32),
        }
        if spec.kind != "caption":
            batch["answer"] = np.empty(count, np.int32)
        if spec.all_texts:
            batch["clip"] = np.empty(count, np.int32)
        # Rows of one clip together: an evaluation asks many questions of each.
        places: dict[tuple[int, int], list[_Place]] = {}
        for row, global_row in enumerate(self.rows):
            place = self._place(row, step * self.batch_size + global_row)
            places.setdefault((place.which, place.clip), []).append(place)
        fill = functools.partial(self._fill, batch)
        for _ in (map if self.threads == 1 else self._pool.map)(fill, places.values()):
            pass
        return batch

    def _place(self, row: int, position: int) -> _Place:
        """What stands at a position."""
        valid = self.train or position < self.length
        example = self._order[position] if self.train else min(position, self.length - 1)
        which = bisect.bisect_right(self._starts, example) - 1
        clip, item = self.examples[which].locate(example - self._starts[which])
        return _Place(row, position, valid, example, which, clip, item)

    def _fill(self, batch: Batch, places: list[_Place]) -> None:
        """Writes all examples of one clip into their rows of the batch."""
        clip = self._clip(places[0].which, places[0].clip)
        for place in places:
            self._write(batch, place, clip)

    def _write(self, batch: Batch, place: _Place, clip: dict[str, Any]) -> None:
        spec, row, item = self.spec, place.row, place.item
        rng = np.random.default_rng((self.seed, place.position))
        if spec.kind == "multiple_choice":
            texts = slice(item * records.OPTIONS, (item + 1) * records.OPTIONS)
        elif item >= 0:
            texts = item
        else:
            texts = int(rng.integers(len(clip["tokens"]))) if self.train else 0
        batch["tokens"][row] = clip["tokens"][texts]
        batch["tags"][row] = clip["tags"][texts]

        frames = clip["frames"]
        height, width = frames[0].shape[:2]
        if self.train and spec.crop == "random":
            crop = augment.random_crop(rng, height, width)
        else:
            crop = augment.center_crop(height, width)
        flip = bool(self.train and spec.flip and rng.random() < 0.5)
        flip = flip and not np.any(clip["sided"][texts])
        augment.crop_frames(frames, crop, spec.image_size, flip, batch["pixels"][row])
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
        spec, split = self.spec, self.examples[which].split
        try:
            record = split.read(index)
            stored = [records.decode_jpeg(record["frames"][t]) for t in self._kept[which]]
        except Exception as error:
            raise UserError(
                f"{split.directory}: clip {index} of {split.split!r} is damaged ({_line(error)}); "
                "build again with --overwrite"
            ) from error
        kept = self._kept[which]
        tokens, tags = fit_tokens(
            record["tokens"], record["tags"], spec.text_length, spec.vocab_size
        )
        clip = {
            "frames": stored,
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
