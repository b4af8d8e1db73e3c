import json

import numpy as np
import pytest
import released_example as example
from clip_tiny import FOLDER
from safetensors.numpy import load_file, save_file

import stoa_jax
from stoa_jax import weights
from stoa_jax.convert import convert, main, parser
from stoa_jax.errors import UserError
from stoa_jax.weights.released import TABLE
from stoa_jax.weights.tables import write_table


def _equal(a, b):
    assert set(a) == set(b)
    for name in a:
        assert np.asarray(a[name], np.float32).tobytes() == b[name].tobytes(), name


def test_hugging_face_there_and_back_bit_by_bit(tmp_path):
    convert(FOLDER, tmp_path / "one", "hugging_face")
    _equal(load_file(FOLDER / "model.safetensors"), load_file(tmp_path / "one/model.safetensors"))
    convert(FOLDER, tmp_path / "ours.safetensors", "safetensors")
    convert(tmp_path / "ours.safetensors", tmp_path / "two", "hugging_face")
    _equal(
        load_file(tmp_path / "one/model.safetensors"), load_file(tmp_path / "two/model.safetensors")
    )
    assert weights.config_of(tmp_path / "two")[0] == weights.config_of(FOLDER)[0]
    assert stoa_jax.load(tmp_path / "two").encode_text(["a dog"]).shape == (1, 24)


def test_released_there_and_back_bit_by_bit(tmp_path):
    tensors = write_table(TABLE, example.parameters(example.TINY.released()))
    save_file(tensors, tmp_path / "theirs.safetensors")
    convert(tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors", "safetensors")
    convert(tmp_path / "ours.safetensors", tmp_path / "again.safetensors", "released")
    _equal(tensors, load_file(tmp_path / "again.safetensors"))


def test_orbax(tmp_path):
    convert(FOLDER, tmp_path / "ours.safetensors", "safetensors", seed=3)
    convert(tmp_path / "ours.safetensors", tmp_path / "workdir", "orbax")
    c, kind = weights.config_of(tmp_path / "workdir")
    assert kind == "workdir"
    params, report = weights.initial_parameters(tmp_path / "workdir", c)
    assert not report.new
    _equal(load_file(tmp_path / "ours.safetensors"), params)
    assert stoa_jax.load(tmp_path / "workdir").kind == "workdir"


def test_a_paper_model_has_no_place_in_the_authors_names(tmp_path, capsys):
    convert(FOLDER, tmp_path / "ours.safetensors", "safetensors")
    out = tmp_path / "theirs.safetensors"
    assert main([str(tmp_path / "ours.safetensors"), str(out), "--to=released"]) == 2
    assert "error: " in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["ours.safetensors"]  # nothing half-written


def test_nothing_is_overwritten_or_half_written(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="already exists"):
        convert(FOLDER, tmp_path / "out", "hugging_face")

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("stoa_jax.convert.json.dumps", full)
    with pytest.raises(OSError):
        convert(FOLDER, tmp_path / "new", "hugging_face")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_report_and_help(tmp_path, capsys):
    assert main([str(FOLDER), str(tmp_path / "x.safetensors"), "--to=safetensors"]) == 0
    said = capsys.readouterr().out
    assert "new fusion/lm_proj [24, 24]" in said and "wrote" in said
    text = parser().format_help()
    for word in ("safetensors", "orbax", "hugging_face", "released", "export", "--activation"):
        assert word in text
    json.loads((FOLDER / "config.json").read_text())


def test_the_head_of_a_task_may_be_new_or_another(tmp_path):
    import dataclasses

    convert(FOLDER, tmp_path / "ours.safetensors", "safetensors")
    c, _ = weights.config_of(tmp_path / "ours.safetensors")
    with_head = dataclasses.replace(c, num_answers=5)
    params, report = weights.initial_parameters(tmp_path / "ours.safetensors", with_head)
    assert set(report.new) == {"fusion/answer/kernel", "fusion/answer/bias"}
    assert set(params) == set(weights.parameter_shapes(c))
    with pytest.raises(UserError, match=r"missing none; not in the model action/"):
        other = dataclasses.replace(c, actions=False)
        weights.initial_parameters(tmp_path / "ours.safetensors", other)
