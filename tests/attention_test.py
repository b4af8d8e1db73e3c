"""The choice between XLA's attention and cuDNN's, and the padded form that cuDNN needs."""

import dataclasses
import logging
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stoa_jax import config, ops
from stoa_jax.errors import UserError
from stoa_jax.models.clip import VisionTower
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.layers import Block
from stoa_jax.ops import cudnn
from stoa_jax.workdir import check_config

RNG = np.random.default_rng(0)
PLATFORMS = ("cpu", "cuda", "tpu")


def normal(*shape: int, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), dtype)


@pytest.mark.parametrize(
    ("platform", "capability", "dtype", "width", "word"),
    [
        ("gpu", "9.0", "bfloat16", 64, None),
        ("gpu", "8.0", "bfloat16", 128, None),
        ("gpu", "8.6", "float16", 8, None),
        ("gpu", "9.0", "bfloat16", 256, None),
        ("gpu", "10.0", "bfloat16", 256, None),
        ("gpu", "8.0", "bfloat16", 256, "multiple of 8 up to 128"),
        ("gpu", "9.0", "bfloat16", 60, "head width is 60"),
        ("gpu", "9.0", "float32", 64, "dtype is float32"),
        ("gpu", "7.5", "float16", 64, "capability 7.5"),
        ("gpu", "gfx942", "bfloat16", 64, "not an NVIDIA GPU"),
        ("gpu", None, "bfloat16", 64, "not an NVIDIA GPU"),
        ("cpu", None, "bfloat16", 64, "platform is 'cpu'"),
        ("tpu", None, "bfloat16", 64, "platform is 'tpu'"),
    ],
)
def test_where_cudnn_can_run(platform, capability, dtype, width, word):
    found = cudnn.cudnn_obstacle(platform, capability, dtype=dtype, head_width=width)
    assert (found is None) if word is None else (word in found and "model.attention=auto" in found)


@pytest.mark.parametrize("length", [1, 7, 49, 50, 63, 197, 257, 577, 12 * 197])
def test_the_padded_length_trains(length):
    padded = cudnn.cudnn_length(length)
    assert length <= padded < length + 16 and padded % 8 == 0 and padded % 128 != 64


@pytest.mark.parametrize("length", [17, 57])
def test_padding_with_lengths_changes_nothing(length):
    q, k, v, gradient = (normal(2, length, 3, 8) for _ in range(4))
    results = []
    for attend in (partial(ops.cudnn_attention, implementation="xla"), ops.attention):

        @jax.jit
        def both(q, k, v, gradient, attend=attend):
            x, backward = jax.vjp(attend, q, k, v)
            return (x, *backward(gradient))

        results.append(both(q, k, v, gradient))
    for padded, plain in zip(*results, strict=True):
        np.testing.assert_allclose(padded, plain, rtol=1e-5, atol=1e-5)


def test_the_trial_accepts_the_padded_form_and_names_what_is_wrong():
    padded = partial(ops.cudnn_attention, implementation="xla")
    assert cudnn.trial(padded, 17, 2, 8, "bfloat16") is None
    wrong = cudnn.trial(lambda q, k, v: padded(q, k, 2 * v), 17, 2, 8, "bfloat16")
    assert wrong is not None and "is off in values by" in wrong
    broken = cudnn.trial(lambda q, k, v: padded(q, k, v) * jnp.nan, 17, 2, 8, "bfloat16")
    assert broken is not None and "is off in values by nan" in broken


def test_a_trial_that_fails_while_a_model_is_traced_is_a_reason():
    """Without a GPU, the real call of cuDNN fails; inside jit too, it is tried outside."""
    found = []

    def traced(x):
        found.append(cudnn._failed_trial(9, 2, 8, "bfloat16"))
        return x

    jax.jit(traced)(1.0)
    assert "failed" in found[0] and "\n" not in found[0] and "model.attention=xla" in found[0]


def choose(requested: str, dtype: str = "bfloat16", **kwargs) -> str:
    return ops.choose_attention(requested, dtype=dtype, heads=2, head_width=8, **kwargs)


def test_the_choice_on_this_cpu(caplog):
    with caplog.at_level(logging.INFO):
        assert choose("xla") == choose("auto") == "xla"
    assert not caplog.records  # nothing falls back: a CPU has no cuDNN
    with pytest.raises(UserError, match=r"'cudnn' cannot run here: the platform is 'cpu'") as e:
        choose("cudnn")
    assert "\n" not in str(e.value) and "model.attention=auto" in str(e.value)


def test_the_choice_on_a_gpu(monkeypatch, caplog):
    monkeypatch.setattr(cudnn, "_device", lambda: ("gpu", "9.0"))
    monkeypatch.setattr(cudnn, "_failed_trial", lambda *_: None)
    assert choose("auto") == choose("cudnn") == choose("auto", length=197) == "cudnn"
    assert choose("xla") == "xla"
    with pytest.raises(UserError, match=r"dtype is float32.*model\.dtype=bfloat16"):
        choose("cudnn", "float32")
    with caplog.at_level(logging.INFO, "absl"):
        cudnn._log_once.cache_clear()
        assert choose("auto", "float32") == choose("auto", "float32") == "xla"
    assert [r.getMessage() for r in caplog.records].count(caplog.records[0].getMessage()) == 1
    assert "XLA instead of cuDNN, because the dtype is float32" in caplog.records[0].getMessage()
    monkeypatch.setattr(cudnn, "_failed_trial", lambda *_: "a trial failed")
    assert choose("auto", length=197) == "xla"
    with pytest.raises(UserError, match="cannot run here: a trial failed"):
        choose("cudnn", length=197)


def test_an_unusable_setting_stops_the_run_before_it_starts():
    c = config.default("pretrain", "tiny")
    check_config(c)
    c.model.attention = "cudnn"
    with pytest.raises(UserError, match=r"config\.model\.attention: 'cudnn' cannot run here"):
        check_config(c)
    with pytest.raises(UserError, match=r"config\.model\.attention"):
        made = dict(depth=1, activation="gelu", implementation="cudnn")
        block = jax.eval_shape(lambda: Block(16, 2, **made, rngs=nnx.Rngs(0)))
        jax.jit(lambda b, x: b(x)).trace(block, jax.ShapeDtypeStruct((1, 5, 16), jnp.bfloat16))


SMALL = dataclasses.replace(
    ModelConfig.tiny(),
    vision_width=32,
    vision_heads=2,
    vision_depth=2,
    dtype="bfloat16",
)
PIXELS = jax.ShapeDtypeStruct((2, 48, 48, 3), jnp.uint8)


def step(tower: VisionTower, pixels: jax.Array):
    return jax.grad(lambda tower: tower(pixels)[0].astype(jnp.float32).sum())(tower)


@pytest.mark.parametrize("attention", ["auto", "xla"])
def test_a_train_step_exports_for_all_platforms(attention):
    c = dataclasses.replace(SMALL, attention=attention)
    tower = jax.eval_shape(lambda: VisionTower(c, rngs=nnx.Rngs(0)))
    leaves, tree = jax.tree.flatten(tower)

    def flat(leaves, pixels):
        return jax.tree.leaves(step(jax.tree.unflatten(tree, leaves), pixels))

    exported = jax.export.export(jax.jit(flat), platforms=PLATFORMS)(leaves, PIXELS)
    assert exported.platforms == PLATFORMS


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Trace as on an H100; jax asks the installed cuDNN for nothing but its version."""
    stablehlo = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(stablehlo, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(cudnn, "_device", lambda: ("gpu", "9.0"))
    monkeypatch.setattr(cudnn, "_failed_trial", lambda *_: None)


def test_the_choice_lowers_for_cuda(as_on_a_gpu):
    tower = jax.eval_shape(lambda: VisionTower(SMALL, rngs=nnx.Rngs(0)))
    traced = jax.jit(step).trace(tower, PIXELS)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax" in text and "__cudnn$fmhaSoftmaxBackward" in text
    assert "Bias" not in text  # no mask became one
    tower = jax.eval_shape(lambda: VisionTower(SMALL, rngs=nnx.Rngs(0)).portable())
    text = jax.jit(step).trace(tower, PIXELS).lower(lowering_platforms=("cuda",)).as_text()
    assert "cudnn" not in text


def test_an_export_made_on_a_gpu_runs_on_a_cpu(as_on_a_gpu):
    tower = jax.eval_shape(lambda: VisionTower(SMALL, rngs=nnx.Rngs(0)))
    leaves, tree = jax.tree.flatten(tower.portable())
    leaves = [jnp.asarray(RNG.normal(size=x.shape, scale=0.1), x.dtype) for x in leaves]

    @jax.jit
    def encode(leaves, pixels):
        return jax.tree.unflatten(tree, leaves)(pixels)[0]

    pixels = jnp.asarray(RNG.integers(0, 256, (3, 48, 48, 3)), jnp.uint8)
    exported = jax.export.export(encode, platforms=PLATFORMS)(leaves, pixels)
    assert exported.platforms == PLATFORMS
    found, wanted = exported.call(leaves, pixels), encode(leaves, pixels)
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(wanted, np.float32))
