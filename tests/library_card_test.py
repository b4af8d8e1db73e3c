"""The model card is made from the run, and is kept through saving, loading and converting."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import saved_models

import stoa_jax
from stoa_jax import config as configs
from stoa_jax import convert
from stoa_jax.inference import run_record
from stoa_jax.models.config import ModelConfig

ROWS = [
    {
        "metric": "retrieval/t2v/R@1",
        "value": 41.25,
        "n": 1000,
        "split": "msrvtt/retrieval:test",
        "split_hash": "00ff00ff",
        "partial": False,
        "protocol": "dual encoder | all pairs",
        "config": {"task": "retrieval"},
        "checkpoint": "/somewhere/checkpoints/7",
    },
    {"metric": "retrieval/t2v/MedR", "value": 2.0, "n": 8, "partial": True, "protocol": "part"},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A saved model, and a work directory with its checkpoint."""
    root = tmp_path_factory.mktemp("made")
    small = dataclasses.replace(ModelConfig.tiny(), text_depth=1, fusion_depth=1)
    source = saved_models.write_random(root / "saved", small)
    convert.convert(source, root / "run", "orbax")
    return root


@pytest.fixture
def workdir(made, tmp_path):
    """A run's directory: a checkpoint, its configuration, its evaluation."""
    shutil.copytree(made / "run", tmp_path / "run")
    config = configs.default("retrieval").to_dict()
    config |= {"task": "retrieval", "seed": 5}
    config["data"]["sets"] = [["msrvtt/retrieval", 1.0], ["webvid/captions", 0.25]]
    config["train"] |= {"steps": 900, "batch_size": 64}
    config["loss"] |= {"vtc": 1.0, "mlm": 0.0}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    (tmp_path / "run" / "results.json").write_text(json.dumps(ROWS))
    return tmp_path / "run"


def card_of(folder):
    return (folder / "README.md").read_text()


def test_the_card_tells_data_recipe_metrics_and_limits(workdir, tmp_path):
    model = stoa_jax.load(workdir)
    model.save(tmp_path / "one")
    card = card_of(tmp_path / "one")
    for line in (
        "# run",
        f"- fingerprint: `{model.fingerprint}`",
        "- trained on: `msrvtt/retrieval:train`",
        "- trained on: `webvid/captions:train`, weight 0.25",
        "- evaluated on: `msrvtt/retrieval:test`, hash `00ff00ff`",
        "- task: retrieval",
        "- batch: 64 examples",
        "- seed: 5",
        "| retrieval/t2v/R@1 | 41.25 | 1000 | msrvtt/retrieval:test | dual encoder \\| all pairs |",
        "| retrieval/t2v/MedR | 2 | 8 |  | part (part of the split) |",
        "Not calibrated: probabilities are the raw output of the match head.",
        "- It lacks what these calls need: answer.",
    ):
        assert line in card.splitlines(), line
    assert "planned" in next(line for line in card.splitlines() if line.startswith("- steps: "))
    losses = next(line for line in card.splitlines() if line.startswith("- losses"))
    assert "vtc 1" in losses and "mlm" not in losses
    assert str(tmp_path) not in card.replace(f"`{tmp_path}", "")  # no path of this machine


def test_the_card_is_kept_however_often_the_model_is_saved(workdir, tmp_path):
    stoa_jax.load(workdir).save(tmp_path / "one")
    stoa_jax.load(tmp_path / "one").save(tmp_path / "two")
    one, two = (card_of(tmp_path / name).splitlines() for name in ("one", "two"))
    assert [line for line in one if line != "# run"] == [line for line in two if line != "# one"]
    kept = json.loads((tmp_path / "two" / "run.json").read_text())
    assert kept["config"]["seed"] == 5 and kept["step"] == run_record.read(workdir)["step"]
    assert "config" not in kept["results"][0]
    convert.convert(workdir, tmp_path / "three.safetensors", "safetensors")
    assert stoa_jax.load(tmp_path / "three.safetensors").record == kept


def test_what_cannot_be_read_is_named(workdir, tmp_path):
    (workdir / "results.json").write_text("{")
    stoa_jax.load(workdir).save(tmp_path / "one")
    assert "`results.json` of the run could not be read" in card_of(tmp_path / "one")


def test_a_card_that_came_with_weights_stays(made, tmp_path):
    source = shutil.copytree(made / "saved", tmp_path / "source")
    front = "---\ntags: [x]\nlicense: mit\n---\n"
    body = "# Theirs\n\nIt was trained on\n## birds\n```sh\n# run\n```\n"
    (source / "README.md").write_text(front + body)
    for name in ("one", "two"):
        model = stoa_jax.load(source)
        model.save(source := tmp_path / name)
        card = card_of(source)
        assert "license: mit" in card.split("---")[1]
        assert card.count("### Theirs") == 1 and "#### birds" in card
        assert "```sh\n# run\n```" in card
    assert np.isfinite(model.encode_text(["a bird"])).all()
    (source / "run.json").write_text("[1]")
    with pytest.raises(stoa_jax.UserError, match=r"run\.json: it must be a JSON object"):
        stoa_jax.load(source)
