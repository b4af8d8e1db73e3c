"""TFDS builders of all data sets, and the encoding that every way of building shares.

`python -m stoa_jax.data.build` builds in parallel and is the recommended way. TFDS's command works
too, and writes the same records:

    tfds build msrvtt/captioning --imports=stoa_jax.data.builders --file_format=array_record \
        --manual_dir=DIR --data_dir=OUT

The program `tfds` (4.9.10) starts only with the packages of the extra `beam` installed.
`python -m stoa_jax.data.tfds_build` is the same command without that need, with the first two flags
set. Importing this module registers the builders and needs no TensorFlow; building through TFDS
does.
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
from stoa_jax.data.sources import DATA_SETS, Source, configurations, open_source
from stoa_jax.errors import UserError

VERSION = "1.0.0"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings that decide a data set's bytes, besides its source."""

    frames: int = 12
    objects: int = 10
    short_side: int = 256
    tagger: str = "default"


def make_parse(tagger: str) -> records.Parse:
    """Return the function texts -> (tokens, tags) with CLIP's tokenizer and a named tagger."""
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
    source: Source, entry: Any, settings: Settings, parse: records.Parse
) -> records.Encoded:
    """Decode and encode one clip; a clip that raises any exception is left out of the data set."""
    clip = source.load(entry, settings.frames, settings.short_side, settings.objects)
    return records.encode(clip, parse, settings.frames, settings.objects)


def reason(error: BaseException) -> str:
    """Format an exception as one line of `failures.jsonl`."""
    message = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return "not enough memory to decode the clip"
    if isinstance(error, ValueError | UserError | OSError) and message:
        return message
    return f"{type(error).__name__}: {message}".rstrip(": ")


@dataclasses.dataclass
class ClipConfig(tfds.core.BuilderConfig):
    """Configuration of a data set: its settings, its detections and the options of its source."""

    settings: Settings = dataclasses.field(default_factory=Settings)
    detections: str | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


class ClipBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Builder that reads a source's clips in order; `failures.jsonl` lists what was left out.

    The environment variable `STOA_DETECTIONS` overrides the configuration's `detections`, because
    `tfds build` has no flag for it.
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
            dl_manager.manual_dir if self.MANUAL_DOWNLOAD_INSTRUCTIONS else None,
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
        self, source: Source, split: str, entries: Sequence[Any], parse: records.Parse
    ) -> Iterator[tuple[int, Any]]:
        failed, first = 0, ""
        for i, entry in enumerate(entries):
            row = {"split": split, "video": entry.video_id}
            try:
                encoded = load_example(source, entry, self._config.settings, parse)
            except Exception as error:  # one bad clip must not end the build
                failed += 1
                first = first or f"{entry.video_id}: {reason(error)}"
                self._name({**row, "error": reason(error), "clip": True})
                continue
            self._name(*({**row, "error": words} for words in encoded.dropped))
            yield i, encoded.example
        if failed == len(entries):  # TFDS would only report an empty split
            raise UserError(f"split {split!r}: none of {failed} clips could be built; {first}")
        logging.info("%s: %d clips built, %d failed", split, len(entries) - failed, failed)

    def _name(self, *rows: Mapping[str, Any]) -> None:
        """Append what was left out to `failures.jsonl`; rows with "clip" are whole clips."""
        with open(Path(self.data_dir) / "failures.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def builder_class(
    name: str, configs: Sequence[ClipConfig], register: bool = False
) -> type[ClipBuilder]:
    """Return the TFDS builder class of a data set with these configurations."""
    body: dict[str, Any] = {
        "__module__": __name__,
        "__doc__": f"The data set {name}.",
        "name": name,
    }
    body["BUILDER_CONFIGS"] = list(configs)
    if any(d.read for d in DATA_SETS.values() if d.set == name):
        body["MANUAL_DOWNLOAD_INSTRUCTIONS"] = (
            "The annotation files as published, and the videos; see docs/data.md."
        )
    return type(name.capitalize(), (ClipBuilder,), body, skip_registration=not register)


for _name, _configs in configurations().items():
    _class = builder_class(_name, [ClipConfig(name=c) for c in _configs], register=True)
    globals()[_class.__name__] = _class


def builder(
    dataset: str, data_dir: str | os.PathLike[str], settings: Settings, **config: Any
) -> ClipBuilder:
    """Return the TFDS builder of `name/configuration` with settings other than the defaults."""
    name, _, configuration = dataset.partition("/")
    chosen = ClipConfig(name=configuration, settings=settings, **config)
    return builder_class(name, [chosen])(
        data_dir=os.fspath(data_dir), config=configuration, file_format="array_record"
    )
