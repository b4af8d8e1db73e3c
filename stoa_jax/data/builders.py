"""The data sets as TFDS builders, and what every way of building them shares.

`python -m stoa_jax.data.build` builds in parallel and is the way to go. TFDS's own way works too:

    tfds build msrvtt/captioning --imports=stoa_jax.data.builders --file_format=array_record \
        --manual_dir=DIR --data_dir=OUT

The program `tfds` (4.9.10) starts only with the packages of the extra `beam`; where they are not,
`python -m stoa_jax.data.tfds_build` is the same command with the first two flags set.
Both ways write
the same records. Importing this module registers the builders and needs no TensorFlow; building
through TFDS does.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from stoa_jax.data import records
from stoa_jax.errors import UserError

VERSION = "1.0.0"

# Data set -> its configurations; `name/configuration` is what users write.
DATASETS: Mapping[str, tuple[str, ...]] = {
    "synthetic": ("captions", "qa", "multiple_choice", "pictures"),
    "folder": ("captions",),
    "webvid": ("captions",),
    "msrvtt": ("captioning", "retrieval", "qa", "multiple_choice"),
    "msvd": ("captioning", "retrieval", "qa"),
    "lsmdc": ("retrieval",),
    "didemo": ("retrieval",),
}
SYNTHETIC_SPLITS = {"train": 3000, "validation": 200, "test": 200}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides a data set's bytes, besides its source."""

    frames: int = 12
    objects: int = 10
    short_side: int = 256
    tagger: str = "default"


@dataclasses.dataclass(frozen=True)
class SyntheticEntry:
    """Which clip of the synthetic world."""

    video_id: str
    split: str
    index: int


class SyntheticSource:
    """The synthetic world, seen as a source like any other."""

    def __init__(self, kind: str, **options: Any):
        numbers = {"seed": 0, "size": 64, "siblings": 2, "max_objects": 4, "twins": 0}
        numbers |= SYNTHETIC_SPLITS
        for name, value in options.items():
            if name not in numbers:
                raise UserError(
                    f"synthetic/{kind}: no option {name!r}; there are {', '.join(numbers)}"
                )
            if not str(value).isdecimal():
                raise UserError(f"synthetic/{kind}: {name}={value!r} is no whole number")
            numbers[name] = int(value)
        from stoa_jax.data import synthetic

        self.kind, self.seed, self.size = kind, numbers["seed"], numbers["size"]
        self.siblings = numbers["siblings"]  # clips in a row that look alike and move otherwise
        self.max_objects = numbers["max_objects"]  # in a clip
        self.twins = numbers["twins"]  # 1: two things of one class in every clip
        self.class_names = tuple(synthetic.CLASS_NAMES)
        self.skipped: list[Any] = []
        self.splits: dict[str, Sequence[SyntheticEntry]] = {
            split: [SyntheticEntry(f"{split}-{i:06d}", split, i) for i in range(numbers[split])]
            for split in SYNTHETIC_SPLITS
        }

    def load(
        self, entry: SyntheticEntry, frames: int, short_side: int, objects: int
    ) -> records.Clip:
        """Renders the clip; its size is the world's, whatever `short_side` is."""
        from stoa_jax.data import synthetic

        world = synthetic.World(
            entry.split,
            self.seed,
            self.size,
            frames=frames,
            siblings=self.siblings,
            max_objects=self.max_objects,
            twins=self.twins,
        )
        draw = world.picture if self.kind == "pictures" else world.clip
        clip = synthetic.as_clip(draw(entry.index), self.kind)
        return dataclasses.replace(clip, video_id=entry.video_id)


def open_source(
    dataset: str,
    manual_dir: str | os.PathLike[str] | None,
    *,
    detections: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Any:
    """The source of a data set `name/configuration`: its splits, and a loader of clips."""
    name, _, config = dataset.partition("/")
    if config not in DATASETS.get(name, ()):
        known = ", ".join(f"{n}/{c}" for n, configs in DATASETS.items() for c in configs)
        raise UserError(f"no data set {dataset!r}; there are {known}")
    if name == "synthetic":
        return SyntheticSource(config, **options)
    if manual_dir is None:
        raise UserError(f"{dataset} reads its published files: give --manual-dir=DIR")
    if not Path(manual_dir).is_dir():
        raise UserError(f"--manual-dir={manual_dir} is no directory")
    from stoa_jax.data import sources

    return sources.open_source(dataset, manual_dir, detections=detections, **options)


def make_parse(tagger: str) -> records.Parse:
    """texts -> (tokens, tags) each, by CLIP's tokenizer and the named part-of-speech tagger."""
    from stoa_jax import text

    tokenizer = text.Tokenizer()
    if tagger == "none":
        untagged = np.zeros(records.TEXT_LENGTH, np.uint8)
        return lambda texts: [(tokenizer.encode(t), untagged) for t in texts]
    spacy_tagger = text.Tagger(tagger)

    def parse(texts: list[str]):
        parsed = text.parse_many(texts, tokenizer, spacy_tagger, length=records.TEXT_LENGTH)
        return [(p.tokens, p.tags) for p in parsed]

    return parse


def load_example(
    source: Any, entry: Any, settings: Settings, parse: records.Parse
) -> records.Encoded:
    """Decodes and encodes one clip; any exception is a reason to leave the clip out."""
    clip = source.load(entry, settings.frames, settings.short_side, settings.objects)
    return records.encode(clip, parse, settings.frames, settings.objects)


def reason(error: BaseException) -> str:
    """An exception as one line of `failures.jsonl`."""
    message = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    if isinstance(error, ValueError | UserError | OSError) and message:
        return message
    return f"{type(error).__name__}: {message}".rstrip(": ")


@dataclasses.dataclass
class ClipConfig(tfds.core.BuilderConfig):
    """A configuration of a data set: its settings, detections and the source's options."""

    settings: Settings = dataclasses.field(default_factory=Settings)
    detections: str | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


class ClipBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Reads a source's clips in order. `failures.jsonl` in the data set's directory names the rest.

    `STOA_DETECTIONS` in the environment takes the place of the configuration's `detections`,
    because `tfds build` has no flag for it.
    """

    VERSION = tfds.core.Version(VERSION)

    @property
    def _config(self) -> ClipConfig:
        config = self.builder_config
        assert isinstance(config, ClipConfig)
        return config

    def _info(self) -> tfds.core.DatasetInfo:
        settings = self._config.settings
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Clips of {self.name}/{self._config.name} as JPEG frames, boxes, "
            "classes, tokens and part-of-speech tags.",
            features=records.features(settings.frames, settings.objects),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Any]]]:
        config = self._config
        source = open_source(
            f"{self.name}/{config.name}",
            None if self.name == "synthetic" else dl_manager.manual_dir,
            detections=os.environ.get("STOA_DETECTIONS") or config.detections,
            **config.options,
        )
        directory = Path(self.data_dir)
        directory.mkdir(parents=True, exist_ok=True)
        records.write_class_names(directory, source.class_names)
        (directory / "failures.jsonl").write_text("")
        self._name(*map(dataclasses.asdict, source.skipped))
        parse = make_parse(config.settings.tagger)
        return {
            split: self._generate_examples(source, split, entries, parse)
            for split, entries in source.splits.items()
            if len(entries)
        }

    def _generate_examples(
        self, source: Any, split: str, entries: Sequence[Any], parse: records.Parse
    ) -> Iterator[tuple[int, Any]]:
        failed, first = 0, ""
        for i, entry in enumerate(entries):
            row = {"split": split, "video": entry.video_id}
            try:
                encoded = load_example(source, entry, self._config.settings, parse)
            except Exception as error:
                failed += 1
                first = first or f"{entry.video_id}: {reason(error)}"
                self._name({**row, "error": reason(error), "clip": True})
                continue
            self._name(*({**row, "error": words} for words in encoded.dropped))
            yield i, encoded.example
        if failed == len(entries):  # TFDS would only say that nothing came
            raise UserError(f"split {split!r}: none of {failed} clips could be built; {first}")
        logging.info("%s: %d clips built, %d failed", split, len(entries) - failed, failed)

    def _name(self, *rows: Mapping[str, Any]) -> None:
        """Adds what was left out to `failures.jsonl`; rows with "clip" are whole clips."""
        with open(Path(self.data_dir) / "failures.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def builder_class(
    name: str, configs: Sequence[ClipConfig], register: bool = False
) -> type[ClipBuilder]:
    """The TFDS builder class of a data set with these configurations."""
    body: dict[str, Any] = {
        "__module__": __name__,
        "__doc__": f"The data set {name}.",
        "name": name,
    }
    body["BUILDER_CONFIGS"] = list(configs)
    if name != "synthetic":
        body["MANUAL_DOWNLOAD_INSTRUCTIONS"] = (
            "The annotation files as published, and the videos; see docs/data.md."
        )
    return type(name.capitalize(), (ClipBuilder,), body, skip_registration=not register)


for _name, _configs in DATASETS.items():
    _class = builder_class(_name, [ClipConfig(name=c) for c in _configs], register=True)
    globals()[_class.__name__] = _class


def builder(
    dataset: str, data_dir: str | os.PathLike[str], settings: Settings, **config: Any
) -> ClipBuilder:
    """The TFDS builder of `name/configuration` with other settings than the defaults."""
    name, _, configuration = dataset.partition("/")
    chosen = ClipConfig(name=configuration, settings=settings, **config)
    return builder_class(name, [chosen])(
        data_dir=os.fspath(data_dir), config=configuration, file_format="array_record"
    )
