"""Names of older versions map to current names."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from flax import nnx
from toy_run import ToyLoader, ToyTask, build_model, run, toy_config

from stoa_jax import checkpoint, config, config_flags, migrations, monitor, train, weights, workdir
from stoa_jax.errors import UserError
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.parameters import named_parameters
from stoa_jax.models.stoa import Stoa
from stoa_jax.weights import files as weights_files


def test_keys_migrate_to_keys_that_exist():
    known = workdir.flat_config(config.default())
    for old, new in migrations.CONFIG_KEYS.items():
        assert old not in known
        assert new is None or new in known


def test_a_saved_configuration_migrates():
    saved = {"init.anew": "^visual/", "train.steps": 7}
    assert migrations.migrate_flat_config(saved) == {"init.reinit": "^visual/", "train.steps": 7}


def test_a_removed_key_is_left_out(monkeypatch):
    monkeypatch.setitem(migrations.CONFIG_KEYS, "model.depth", None)
    monkeypatch.setitem(migrations.CONFIG_KEYS, "model.wide", "model.text_width")
    assert migrations.migrate_model_fields({"depth": 3, "wide": 8}) == {"text_width": 8}


def test_parameter_names_migrate(monkeypatch):
    monkeypatch.setitem(migrations.PARAMETERS, r"video/(.*)", r"visual/\1")
    renames = migrations.parameter_renames(["video/cls", "visual/cls", "my/video/cls"])
    assert renames == {"video/cls": "visual/cls"}


def test_a_work_directory_with_an_old_key_is_claimed(tmp_path):
    c = config.default()
    saved = workdir.config_json(c)
    saved["init"]["anew"] = saved["init"].pop("reinit")
    (tmp_path / "config.json").write_text(json.dumps(saved))
    workdir.claim_workdir(c, tmp_path)
    c.init.reinit = "^fusion/"
    with pytest.raises(Exception, match=r"init\.reinit '' → '\^fusion/'"):
        workdir.claim_workdir(c, tmp_path)


def test_a_work_directory_without_a_key_that_came_later_is_claimed(tmp_path):
    c = config.default()
    saved = workdir.config_json(c)
    del saved["eval"]["rerank"], saved["optim"]["clip_norm"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    workdir.claim_workdir(c, tmp_path)
    c.optim.clip_norm = 3.0
    with pytest.raises(Exception, match=r"optim\.clip_norm 1\.0 → 3\.0"):
        workdir.claim_workdir(c, tmp_path)


def test_a_run_may_continue_with_a_cache_for_its_clips(tmp_path):
    c = config.default()
    (tmp_path / "config.json").write_text(json.dumps(workdir.config_json(c)))
    c.data.live_dir = "cache"
    workdir.claim_workdir(c, tmp_path)


def test_a_renamed_key_on_the_command_line_names_the_new_one():
    argv = ["main", "--config=configs/pretrain.py:synthetic", "--config.init.anew=^visual/"]
    with pytest.raises(UserError, match=r"--config\.init\.anew was renamed; write init\.reinit"):
        config_flags.parse(flags.FlagValues(), argv)


def test_a_renamed_key_in_a_configuration_file_names_the_new_one(tmp_path):
    path = tmp_path / "experiment.py"
    path.write_text(
        "from stoa_jax import config\n"
        "def get_config():\n"
        "    c = config.default()\n"
        "    c.init.anew = '^visual/'\n"
        "    return c\n"
    )
    with pytest.raises(UserError, match=r"init\.anew was renamed; write init\.reinit"):
        config_flags.parse(flags.FlagValues(), ["main", f"--config={path}"])


def old_model(c, *, rngs):
    """Return the toy model under the names of an older version: `video` for `visual`."""
    model = build_model(c, rngs=rngs)

    class OldToy(nnx.Module):
        def __init__(self):
            self.video, self.fusion = model.visual, model.fusion

        def __call__(self, x):
            x = jnp.tanh(x @ self.video.kernel[...] + self.video.bias[...])
            return x @ self.fusion.kernel[...] + self.fusion.bias[...]

    return OldToy()


def test_a_run_of_an_older_version_continues_to_the_bit(tmp_path, monkeypatch):
    """Parameters, moments and the configuration are saved under old names and fields."""
    c = toy_config(train__steps=8)
    c.optim.groups = ((r".*", 1e-2),)
    run(tmp_path / "whole", c)
    with monkeypatch.context() as m:
        m.setattr(monitor.Stopper, "should_stop", lambda self, step: step == 5)
        train.train(
            c,
            tmp_path / "old",
            task=ToyTask(),
            build_model=old_model,
            open_loader=lambda step: ToyLoader(c, step),
        )
    saved = json.loads((tmp_path / "old/config.json").read_text())
    saved["init"]["anew"] = saved["init"].pop("reinit")
    (tmp_path / "old/config.json").write_text(json.dumps(saved))
    monkeypatch.setitem(migrations.PARAMETERS, r"video/(.*)", r"visual/\1")
    monkeypatch.setitem(migrations.CONFIG_KEYS, "model.inputs", "model.channels")
    params, fields, _ = checkpoint.load_params(tmp_path / "old")
    assert {name.split("/")[0] for name in params} == {"visual", "fusion"}
    assert fields == {"channels": 8, "width": 16}

    run(tmp_path / "old", c)
    old, whole = (checkpoint.load_params(tmp_path / name)[0] for name in ("old", "whole"))
    assert old.keys() == whole.keys()
    for name in whole:
        assert old[name].tobytes() == whole[name].tobytes(), name


def test_safetensors_of_an_older_version_load(tmp_path, monkeypatch):
    c = dataclasses.replace(ModelConfig.tiny(), scan_layers=False)
    rng = np.random.default_rng(0)
    params = {
        name: rng.standard_normal(shape, np.float32)
        for name, shape in weights.parameter_shapes(c).items()
    }
    fields = dataclasses.asdict(c)
    fields["pixels"] = fields.pop("image_size")
    old = {name.replace("visual/", "video/"): x for name, x in params.items()}
    path = tmp_path / "old.safetensors"
    weights_files.save_safetensors(path, old, {weights.METADATA: json.dumps(fields)})
    with pytest.raises(UserError):
        weights.config_of(path)
    monkeypatch.setitem(migrations.PARAMETERS, r"video/(.*)", r"visual/\1")
    monkeypatch.setitem(migrations.CONFIG_KEYS, "model.pixels", "model.image_size")
    assert weights.config_of(path) == (c, "stoa_jax")
    loaded, _ = weights.initial_parameters(path, c)
    assert loaded.keys() == params.keys()
    for name, x in params.items():
        np.testing.assert_array_equal(loaded[name], x)


def test_safetensors_with_one_table_of_positions_load(tmp_path):
    c = ModelConfig.tiny()
    params = {n: np.asarray(x) for n, x in named_parameters(Stoa(c, rngs=nnx.Rngs(0))).items()}
    old = dict(params)
    old["fusion/positions"] = np.concatenate(
        [old["fusion/positions"], old.pop("fusion/more_positions")]
    )
    old["fusion/mask_input"] = np.ones(c.text_width, np.float32)
    path = tmp_path / "old.safetensors"
    weights_files.save_safetensors(path, old, {weights.METADATA: json.dumps(dataclasses.asdict(c))})
    found, report = weights.initial_parameters(path, weights.config_of(path)[0])
    assert not report.new and set(found) == set(params)
    for name, x in params.items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)
