import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import toy_source

from stoa_jax.data import beam, pipeline
from stoa_jax.errors import UserError

FAULTS = {("train", 3): "raise", ("train", 20): "crash"}


@pytest.mark.beam
def test_beam_writes_the_same_bytes(tmp_path):
    source = toy_source.Source({"train": 40, "test": 5}, faults=FAULTS)
    for options in ([], ["--direct_num_workers=2", "--direct_running_mode=multi_threading"]):
        out = tmp_path / f"beam{len(options)}"
        toy_source.build(out, source, run=functools.partial(beam.run, options=options))
        toy_source.build(tmp_path / "plain", source)
        assert toy_source.tree(out) == toy_source.tree(tmp_path / "plain")


@pytest.mark.beam
def test_beam_goes_on_with_what_was_begun(tmp_path):
    log = tmp_path / "log"
    source = toy_source.Source({"train": 40}, log=log)
    toy_source.build(tmp_path / "out", source)
    whole = toy_source.tree(tmp_path / "out")
    final = tmp_path / "out" / "folder" / "captions" / "1.0.0"
    unfinished = final.rename(final.with_name("1.0.0.building"))
    next(unfinished.glob("clips/train-00001-*")).unlink()
    log.write_text("")
    toy_source.build(tmp_path / "out", source, run=beam.run)
    assert sorted(log.read_text().split()) == sorted(f"train{i}" for i in range(16, 32))
    assert toy_source.tree(tmp_path / "out") == whole


@pytest.mark.beam
def test_the_program_tfds_builds(tmp_path):
    tfds = Path(sys.executable).with_name("tfds")
    arguments = ["--imports=stoa_jax.data.builders", "--file_format=array_record"]
    arguments += [f"--data_dir={tmp_path}", "--max_examples_per_split=2"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [str(tfds), "build", "synthetic/captions", *arguments]
    subprocess.run(command, check=True, capture_output=True, env=env, timeout=200)
    split = pipeline.open_split(tmp_path, "synthetic/captions", "test")
    assert [split.metadata(i).video_id for i in range(2)] == ["test-000000", "test-000001"]


def test_without_beam_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"pip install 'stoa-jax\[beam\]'"):
        toy_source.build(tmp_path, toy_source.Source({"train": 2}), run=beam.run)
