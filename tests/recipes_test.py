"""The recipes of CONTRIBUTING.md, followed: new file, registration, two steps of training."""

import dataclasses
import importlib.util
import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import videos
from toy_run import RealLoader, RealTask, toy_config

from stoa_jax import config, joint_loss, sharding, tasks, train, writers
from stoa_jax.data import builders, sources
from stoa_jax.data.build.run import build
from stoa_jax.program import make_program

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
BLOCKS = {
    block.split("\n", 1)[0].removeprefix("# recipe: "): block
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
}
POSITIONS = ("positions", "more_positions")  # the parameters of the fusion encoder's table


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Return a function that writes a recipe's code as a module of its name in the package."""

    def write(recipe, name):
        path = tmp_path / f"{name.rpartition('.')[2]}.py"
        path.write_text(BLOCKS[recipe])
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return write


def small_config(**settings):
    """Return a configuration that compiles fast for `RealLoader`'s batches; only VTC is on."""
    c = toy_config(train__steps=2, train__batch_size=8, eval__every_steps=-1, **settings)
    c.model.update(dataclasses.asdict(RealTask(c).model_config()))
    c.optim.groups = ((r".*", 1e-3),)
    config.set_losses(c, vtc=1.0)
    return c


def two_steps(program, c):
    loader, state = iter(RealLoader(c, 0)), program.init()
    before = {name: np.asarray(x) for name, x in state.params.items()}
    with jax.set_mesh(program.mesh):
        for _ in range(2):
            batch = sharding.to_devices(next(loader), program.mesh, c.train.batch_size)
            state, values = program.step(state, batch)
    assert int(state.step) == 2 and int(state.skipped) == 0
    moved = {name for name, x in state.params.items() if (np.asarray(x) != before[name]).any()}
    return dict(zip(program.metrics, np.asarray(values).tolist(), strict=True)), moved


def test_there_are_four_recipes_and_each_lists_files_that_exist():
    assert list(BLOCKS) == ["loss", "task", "data set", "encoder"]
    root = Path(__file__).parents[1]
    named = re.findall(r"`((?:stoa_jax|docs|tests|configs)/[\w/.-]+\.(?:py|md))`", TEXT)
    assert len(named) > 15
    missing = {name for name in named if "NAME" not in name and not (root / name).exists()}
    assert missing == set()


@pytest.mark.slow
def test_add_a_loss(written, monkeypatch):
    c = small_config()
    monkeypatch.setattr(joint_loss, "LOSSES", dict(joint_loss.LOSSES))
    written("loss", "stoa_jax.smooth_loss")
    with c.loss.unlocked():
        c.loss.smooth = 0.5
    metrics, moved = two_steps(make_program(c, RealTask(c), 2, devices=jax.devices()[:1]), c)
    expected = metrics["loss_vtc"] + 0.5 * metrics["loss_smooth"]
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["loss_smooth"] > 0 and metrics["largest_change"] > 0 and "visual/proj" in moved


@pytest.mark.slow
def test_add_a_task(written, monkeypatch, tmp_path):
    written("task", "stoa_jax.tasks.contrast")
    monkeypatch.setitem(tasks.TASKS, "contrast", "contrast:Contrast")
    c = small_config(task="contrast")
    last = train.train(c, tmp_path / "run", open_loader=lambda step: RealLoader(c, step))
    assert last["step"] == 2 and last["loss"] == last["loss_contrast"] > 0
    assert json.loads((tmp_path / "run/result.json").read_text())["task"] == "contrast"


@pytest.mark.slow
def test_add_a_data_set(written, monkeypatch, tmp_path):
    mine = written("data set", "stoa_jax.data.sources.mine")
    for data_set in mine.DATA_SETS:
        monkeypatch.setitem(sources.DATA_SETS, data_set.name, data_set)
    assert sources.data_set_for("pretrain", "mine").name == "mine/captions"
    manual = tmp_path / "manual"
    manual.mkdir()
    for i in range(8):
        videos.write(manual / f"clip{i}.mp4", count=8)
    rows = [{"clip": f"clip{i}", "caption": f"clip number {i}"} for i in range(8)]
    (manual / "captions.json").write_text(json.dumps([*rows, {"clip": "clip0", "caption": " "}]))
    settings = builders.Settings(frames=2, objects=3, short_side=24, tagger="none")
    summary = build("mine/captions", tmp_path / "data", manual, settings=settings)
    assert "the caption is empty" in (tmp_path / "data/failures.jsonl").read_text()
    assert summary is not None

    c = small_config(data__dir=str(tmp_path / "data"), data__sets=(("mine/captions", 1.0),))
    train.train(c, tmp_path / "run")
    rows = [r for r in writers.read_lines(tmp_path / "run/metrics.jsonl") if "loss_vtc" in r]
    assert [row["step"] for row in rows] == [1, 2]


@pytest.mark.slow
def test_add_an_encoder(written):
    module = written("encoder", "stoa_jax.models.colour")
    c = small_config()
    config.set_losses(c, plm=1.0)  # reaches the new token through the fusion encoder
    task = RealTask(c)
    fields = dataclasses.asdict(task.model_config())
    task.model_config = lambda: module.ColourConfig(**fields)
    program = make_program(c, task, 2, module.ColourStoa, devices=jax.devices()[:1])
    assert program.state.params["colour/proj"].shape == (3 * 2, 32)
    rows = {name: program.state.params[f"fusion/{name}"].shape[0] for name in POSITIONS}
    c_model = task.model_config()
    assert rows == {"positions": c_model.text_positions, "more_positions": c_model.visual_length}
    _, moved = two_steps(program, c)
    assert "colour/proj" in moved
