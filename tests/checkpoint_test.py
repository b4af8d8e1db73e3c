"""Checkpoints: saving, keeping, restoring elsewhere, damage."""

import errno
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from toy_run import toy_config

from stoa_jax import checkpoint
from stoa_jax.errors import UserError

PARAMS = {
    "visual/cls": jnp.arange(8.0),
    "visual/blocks/kernel": jnp.linspace(-1, 1, 16 * 8).reshape(16, 8),
    "logit_scale": jnp.array(2.0),
}
OPTIMIZER = {"1/count": jnp.array(3), "1/mu/visual/cls": jnp.arange(8.0) / 3}
META = {"model": {"width": 8}, "extras": {"answers": ["yes"]}}


def placed(arrays, count, dims=1):
    mesh = jax.make_mesh((count,), ("fsdp",), devices=jax.devices()[:count])
    out = {}
    for name, x in arrays.items():
        spec = PartitionSpec("fsdp") if x.ndim >= dims and x.shape[0] % count == 0 else None
        out[name] = NamedSharding(mesh, spec or PartitionSpec())
    return out


def on(arrays, count):
    return {name: jax.device_put(arrays[name], s) for name, s in placed(arrays, count).items()}


def like(arrays, count):
    return {
        name: jax.ShapeDtypeStruct(arrays[name].shape, arrays[name].dtype, sharding=s)
        for name, s in placed(arrays, count).items()
    }


@pytest.fixture
def saved(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, toy_config())
    for step in (1, 2, 3):
        checkpoints.save(step, on(PARAMS, 4), on(OPTIMIZER, 4), META)
    checkpoints.close()
    return tmp_path


@pytest.mark.parametrize("count", [1, 2, 8])
def test_restored_bit_for_bit_on_any_number_of_devices(saved, count):
    checkpoints = checkpoint.Checkpoints(saved, toy_config())
    step, params, optimizer, meta = checkpoints.restore(like(PARAMS, count), like(OPTIMIZER, count))
    assert step == 3 and meta == {**META, "step": 3}
    for found, expected in ((params, PARAMS), (optimizer, OPTIMIZER)):
        assert found.keys() == expected.keys()
        for name in expected:
            assert found[name].sharding == placed(expected, count)[name]
            np.testing.assert_array_equal(found[name], expected[name])
    checkpoints.close()


def test_only_the_newest_are_kept(saved):
    assert checkpoint.Checkpoints(saved, toy_config(checkpoint__keep=2)).steps() == [2, 3]


@pytest.mark.parametrize(("mode", "kept"), [("max", [2, 5]), ("min", [3, 5])])
def test_the_best_is_kept_too(tmp_path, mode, kept):
    c = toy_config(checkpoint__keep=1, checkpoint__best_metric="R@1", checkpoint__best_mode=mode)
    checkpoints = checkpoint.Checkpoints(tmp_path, c)
    for step, value in enumerate([0.2, 0.9, 0.1, 0.3, 0.4], 1):
        checkpoints.save(step, PARAMS, OPTIMIZER, META, {"R@1": value})
    checkpoints.wait()
    assert checkpoints.steps() == kept
    checkpoints.close()


def test_load_params_reads_on_the_host(saved):
    params, model, rest = checkpoint.load_params(saved)
    assert model == META["model"] and rest["extras"] == META["extras"] and rest["step"] == 3
    assert params.keys() == PARAMS.keys()
    for name, value in params.items():
        assert isinstance(value, np.ndarray)
        np.testing.assert_array_equal(value, PARAMS[name])
    assert checkpoint.load_params(saved, 2)[2]["step"] == 2


def test_load_params_says_what_there_is(saved, tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint of step 7; available steps: \[2, 3\]"):
        checkpoint.load_params(saved, 7)
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint.load_params(tmp_path / "elsewhere")


def damage(folder, how):
    files = [p for p in (folder / "params").rglob("*") if p.is_file() and p.stat().st_size > 100]
    data = [p for p in files if "/d/" in str(p)]
    if how == "flipped":
        for path in data:
            raw = bytearray(path.read_bytes())
            raw[len(raw) // 2] ^= 0xFF
            path.write_bytes(raw)
    elif how == "cut":
        for path in data:
            path.write_bytes(path.read_bytes()[:20])
    elif how == "gone":
        shutil.rmtree(folder / "params")
    elif how == "meta":
        (folder / "meta" / "metadata").write_text("{")


@pytest.mark.parametrize("how", ["flipped", "cut", "gone", "meta"])
def test_a_damaged_newest_is_named_and_the_one_before_is_used(saved, how, caplog):
    damage(saved / "checkpoints" / "3", how)
    with pytest.raises(UserError, match=r"checkpoints/3 is damaged"):
        checkpoint.load_params(saved)
    checkpoints = checkpoint.Checkpoints(saved, toy_config())
    step, params, _, _ = checkpoints.restore(like(PARAMS, 2), like(OPTIMIZER, 2))
    assert step == 2
    np.testing.assert_array_equal(params["visual/cls"], PARAMS["visual/cls"])
    assert "checkpoint 3 is damaged" in caplog.text
    assert (saved / "damaged-checkpoint-3").is_dir() and checkpoints.steps() == [2]
    checkpoints.save(3, PARAMS, OPTIMIZER, META)  # the same step again
    checkpoints.close()
    assert checkpoint.load_params(saved)[2]["step"] == 3


def test_an_error_without_a_message_is_damage_too(saved, monkeypatch, caplog):
    checkpoints = checkpoint.Checkpoints(saved, toy_config())
    restore = checkpoints._restore

    def failing(step, *arrays):
        if step == 3:
            raise AssertionError
        return restore(step, *arrays)

    monkeypatch.setattr(checkpoints, "_restore", failing)
    assert checkpoints.restore(like(PARAMS, 2), like(OPTIMIZER, 2))[0] == 2
    assert "checkpoint 3 is damaged (AssertionError)" in caplog.text
    checkpoints.close()


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: out of memory")]
)
def test_too_little_memory_is_not_damage(saved, monkeypatch, error):
    checkpoints = checkpoint.Checkpoints(saved, toy_config())

    def failing(step, *arrays):
        raise error

    monkeypatch.setattr(checkpoints, "_restore", failing)
    with pytest.raises(type(error)):
        checkpoints.restore(like(PARAMS, 2), like(OPTIMIZER, 2))
    checkpoints.close()
    assert checkpoint.load_params(saved)[2]["step"] == 3  # not moved aside


def test_checksums_see_what_the_file_format_does_not():
    before = checkpoint.checksums(PARAMS)
    swapped = {**PARAMS, "visual/cls": PARAMS["visual/cls"].at[jnp.array([1, 2])].set([2.0, 1.0])}
    after = checkpoint.checksums(swapped)
    assert before["visual/cls"] != after["visual/cls"]
    assert checkpoint.checksums(on(PARAMS, 8)) == before


def test_another_models_checkpoint_is_refused(saved):
    checkpoints = checkpoint.Checkpoints(saved, toy_config())
    other = like({**PARAMS, "extra": jnp.ones(2)}, 1)
    with pytest.raises(UserError, match=r"another model or optimizer.*'extra'"):
        checkpoints.restore(other, like(OPTIMIZER, 1))


def test_a_full_disk_is_a_clear_error_and_the_last_good_one_stays(saved, monkeypatch):
    checkpoints = checkpoint.Checkpoints(saved, toy_config())

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(UserError, match=r"checkpoint 4 could not be written.*is step 3.*free some"):
        checkpoints.save(4, PARAMS, OPTIMIZER, META)
    assert checkpoint.load_params(saved)[2]["step"] == 3


def test_flatten_and_back():
    state = {"a": [jnp.ones(1), jnp.zeros(2)], "b": (jnp.ones(3),)}
    flat = checkpoint.flatten(state)
    assert list(flat) == ["a/0", "a/1", "b/0"]
    back = checkpoint.unflatten(state, flat)
    assert jax.tree.structure(back) == jax.tree.structure(state)
