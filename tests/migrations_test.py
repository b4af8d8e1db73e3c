"""Names of older versions map to today's."""

import json

import pytest

from stoa_jax import config, migrations, workdir


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
