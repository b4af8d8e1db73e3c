import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stoa_jax import config
from stoa_jax.data import builders, pipeline, records, sources
from stoa_jax.data.build.run import build
from stoa_jax.data.check.run import check
from stoa_jax.errors import UserError

HERE = Path(__file__).parent
SMALL = {"train": 5, "validation": 3, "test": 2}


def test_every_published_set_has_a_builder():
    import tensorflow_datasets as tfds

    for name, configs in sources.configurations().items():
        assert all(sources.find(f"{name}/{c}").set == name for c in configs)
        cls = tfds.builder_cls(name)
        assert (cls.MANUAL_DOWNLOAD_INSTRUCTIONS is None) == (name == "synthetic")
        assert cls.__module__ == "stoa_jax.data.builders"
        assert [c.name for c in cls.BUILDER_CONFIGS] == list(configs)


@pytest.mark.parametrize("kind", ["captions", "qa", "multiple_choice"])
def test_synthetic_world_comes_out_as_it_went_in(tmp_path, kind):
    from stoa_jax.data import synthetic

    settings = builders.Settings(frames=6, objects=5, tagger="none")
    options = {"seed": 3, "size": 32, **SMALL}
    summary = build(f"synthetic/{kind}", tmp_path, settings=settings, options=options)
    assert summary.built == SMALL
    split = pipeline.open_split(tmp_path, f"synthetic/{kind}", "test")
    assert split.class_names == tuple(synthetic.CLASS_NAMES)
    assert split.kind == {"captions": "caption"}.get(kind, kind)
    world = synthetic.World("test", seed=3, size=32, frames=6)
    record, clip = split.read(1), synthetic.as_clip(world.clip(1), kind)
    assert [t.decode() for t in record["texts"]] == clip.texts
    assert [a.decode() for a in record["answers"]] == clip.answers
    frames = np.stack([records.decode_jpeg(f) for f in record["frames"]]).astype(float)
    assert np.abs(frames - np.stack(clip.frames)).mean() < 6  # JPEG
    order = np.argsort(-np.where(clip.classes >= 0, clip.scores, 0), 1, kind="stable")[:, :5]
    np.testing.assert_array_equal(record["classes"], np.take_along_axis(clip.classes, order, 1))


def test_tfds_build_writes_the_same_records(tmp_path):
    arguments = ["synthetic/captions", f"--data_dir={tmp_path}", "--max_examples_per_split=2"]
    env = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    subprocess.run(
        [sys.executable, "-m", "stoa_jax.data.tfds_build", *arguments],
        check=True,
        capture_output=True,
        env=env,
        timeout=200,
    )
    ours = tmp_path / "ours"
    build("synthetic/captions", ours, limit=2)
    for part in ("train", "validation", "test"):
        theirs = pipeline.open_split(tmp_path, "synthetic/captions", part)
        own = pipeline.open_split(ours, "synthetic/captions", part)
        assert len(theirs) == len(own) == 2
        assert theirs.fingerprint == own.fingerprint
        assert theirs.class_names == own.class_names
        assert theirs.metadata(1) == own.metadata(1)
        for i in range(2):
            a, b = theirs.read(i), own.read(i)
            assert a.keys() == b.keys()
            for name in a:
                np.testing.assert_array_equal(a[name], b[name])
    assert (own.read(0)["tags"] == 3).any(), "a caption of the world has a verb"


def test_tfds_build_skips_and_names_what_it_cannot_read(tmp_path, monkeypatch):
    import toy_source

    faults = {("train", 2): "raise", ("train", 3): "one empty"}
    source = toy_source.Source({"train": 4}, faults=faults)
    source.skipped = [sources.Skipped("gone", "no caption", "captions.csv", 7)]
    monkeypatch.setattr(builders, "open_source", lambda *_, **__: source)
    builder = builders.builder("folder/captions", tmp_path / "out", toy_source.SETTINGS)
    (tmp_path / "manual").mkdir()
    (tmp_path / "manual" / "captions.csv").write_text("")
    import tensorflow_datasets as tfds

    download = tfds.download.DownloadConfig(manual_dir=tmp_path / "manual")
    builder.download_and_prepare(download_config=download)
    split = pipeline.open_split(tmp_path / "out", "folder/captions", "train")
    assert [split.metadata(i).video_id for i in range(3)] == ["train0", "train1", "train3"]
    lines = (split.directory / "failures.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"video": "gone", "error": "no caption", "file": "captions.csv", "line": 7},
        {"split": "train", "video": "train2", "error": "moov atom not found", "clip": True},
        {"split": "train", "video": "train3", "error": "caption 3 has no words; left out"},
    ]
    c = config.default("retrieval", "tiny")
    c.data.sets, c.data.eval_split = (("folder/captions", 1.0),), "train"
    found = check(c, data_dir=tmp_path / "out").parts["folder/captions:train"]
    assert found["failed"] == ["train2: moov atom not found"]


def test_tfds_build_of_a_split_without_a_clip_says_why(tmp_path):
    import tensorflow_datasets as tfds

    (tmp_path / "captions.csv").write_text("video,caption\ngone,A dog runs\n")
    builder = builders.builder("folder/captions", tmp_path / "out", builders.Settings())
    download = tfds.download.DownloadConfig(manual_dir=tmp_path)
    with pytest.raises(UserError, match=r"'train': none of 1 clips .* gone: .*No such file"):
        builder.download_and_prepare(download_config=download)


def test_options_of_the_world_are_checked():
    with pytest.raises(UserError, match="no option 'colour'; there are seed, size"):
        builders.open_source("synthetic/qa", None, colour=3)
    with pytest.raises(UserError, match="size='big' is not a whole number"):
        builders.open_source("synthetic/qa", None, size="big")
    with pytest.raises(UserError, match="no data set 'synthetic/speech'"):
        builders.open_source("synthetic/speech", None)
