"""The preset `released` against values of the authors' code (benchmarks/parity_released.py)."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import released_example as example
from safetensors.numpy import save_file

from stoa_jax import weights
from stoa_jax.errors import UserError
from stoa_jax.models import layers
from stoa_jax.weights.released import TABLE, UNUSED
from stoa_jax.weights.tables import write_table

GOLDEN = Path(__file__).parent / "data" / "released.json"
TINY = example.TINY


def test_numbers_of_the_authors_code(monkeypatch):
    c = example.SMALL
    data = example.batch(c, 2)
    found = example.numbers(example.model(c, example.parameters(c)), data, monkeypatch)
    ours, golden = example.sample(found), json.loads(GOLDEN.read_text())
    assert set(ours) == set(golden)
    for name, values in golden.items():
        np.testing.assert_allclose(ours[name], values, atol=1e-4, err_msg=name)


def test_one_pass_is_as_many_passes_as_words():
    rng = np.random.RandomState(0)
    c = dataclasses.replace(TINY.released(), fusion_depth=2, head_dropout=0.0)
    m = example.model(c, example.parameters(c))
    data = example.batch(c, 2)
    inputs = [data[name] for name in ("pixels", "boxes", "classes", "scores")]
    video = jax.jit(lambda *x: m.encode_video(*x))(*inputs)
    text = jax.jit(m.encode_text)(data["tokens"]).tokens
    predict = jax.jit(lambda text: m.next_token_features(video, text))
    features = predict(text)
    for i in (0, 3, c.text_length - 2):
        # Tokens after word i cannot matter, and word i does.
        other = text.at[:, i + 1 :].set(jnp.asarray(rng.standard_normal(text[:, i + 1 :].shape)))
        again = predict(other)
        np.testing.assert_allclose(again[:, : i + 1], features[:, : i + 1], atol=1e-5)
        changed = predict(text.at[:, i].add(jnp.asarray(rng.standard_normal(text.shape[-1]))))
        assert np.abs(changed[:, i] - features[:, i]).max() > 1e-3


def test_padding_changes_nothing():
    c = dataclasses.replace(TINY.released(), head_dropout=0.0)
    m = example.model(c, example.parameters(c))
    data = example.batch(c, 2)
    of = jax.jit(
        lambda boxes: m.encode_video(data["pixels"], boxes, data["classes"], data["scores"])
    )
    padding = data["classes"] < 0
    assert padding.any()
    a, b = of(data["boxes"]), of(np.where(padding[..., None], 0.77, data["boxes"]))
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def test_dropout_only_with_a_key():
    x = jnp.ones((4, 1000))
    np.testing.assert_array_equal(layers.dropout(x, 0.5, None), x)
    dropped = layers.dropout(x, 0.5, jax.random.key(0))
    assert set(np.unique(dropped)) == {0.0, 2.0} and abs(float(dropped.mean()) - 1) < 0.1


def _checkpoint(path, c, extra=()):
    tensors = write_table(TABLE, example.parameters(c))
    save_file({**tensors, **{name: np.zeros(3, np.float32) for name in extra}}, path)
    return path


def test_checkpoint_of_the_authors(tmp_path):
    c = TINY.released()
    unread = ["clip.fusion_transformer.resblocks.6.ln_1.weight", "clip.lm_head.bias", "obj_proj"]
    path = _checkpoint(tmp_path / "stoa.safetensors", c, unread)
    found, kind = weights.config_of(path)
    assert kind == "released"
    sizes = ("vision_depth", "frames", "objects_per_frame", "trajectories", "fusion_position_rows")
    assert [getattr(found, s) for s in sizes] == [getattr(c, s) for s in sizes]
    assert found.joint_blocks == 2 and found.match_head == "bilinear"
    params, report = weights.initial_parameters(path, c)
    assert not report.new and set(report.unused) == set(unread) and all(report.unused.values())
    for name, x in example.parameters(c).items():
        np.testing.assert_array_equal(params[name], x, err_msg=name)
    assert len({why for _, why in UNUSED}) > 3


def test_paper_model_cannot_take_it(tmp_path):
    path = _checkpoint(tmp_path / "stoa.safetensors", TINY.released())
    with pytest.raises(UserError, match=r"fits only the preset `released`"):
        weights.initial_parameters(path, TINY)
