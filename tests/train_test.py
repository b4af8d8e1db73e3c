"""The loop: what a run writes, that it resumes bit-identically, and what a bad step does."""

import json
import re

import jax
import numpy as np
import pytest
from toy_run import ToyLoader, ToyTask, build_model, compiled_once, run, toy_config

from stoa_jax import checkpoint, monitor, sharding, train, writers
from stoa_jax.errors import UserError
from stoa_jax.program import make_program

TIMES = ("time/", "memory/")


def metric_rows(workdir):
    """Return the rows of metrics.jsonl, without times and memory."""
    rows = writers.read_lines(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


def everything(workdir, c):
    """Return all arrays of the newest checkpoint."""
    program = make_program(c, ToyTask(), c.train.steps, build_model)
    found = checkpoint.Checkpoints(workdir, c)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        program.state,
        program.shardings,
    )
    flat = checkpoint.flatten(state)
    rest = {k: v for k, v in flat.items() if not k.startswith("params/")}
    step, params, optimizer, _ = found.restore(state.params, rest)
    found.close()
    return step, {**params, **optimizer}


def assert_same_bits(a, b):
    assert a[0] == b[0] and a[1].keys() == b[1].keys()
    for name in a[1]:
        x, y = np.asarray(a[1][name]), np.asarray(b[1][name])
        assert x.tobytes() == y.tobytes(), name


@pytest.fixture(scope="module", autouse=True)
def compilations(tmp_path_factory):
    with compiled_once(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Run 20 steps without interruption."""
    workdir = tmp_path_factory.mktemp("whole")
    c = toy_config(eval__every_steps=8, train__accumulate=2)
    return workdir, c, run(workdir, c)


def test_a_run_learns_and_leaves_its_metrics(whole):
    workdir, _, last = whole
    rows = writers.read_lines(workdir / "metrics.jsonl")
    train_rows = [row for row in rows if "loss" in row]
    assert [row["step"] for row in train_rows] == list(range(1, 21))
    assert train_rows[-1]["loss"] < 0.7 * train_rows[0]["loss"]
    assert {
        *("loss_vtc", "weight/vtc", "grad_norm", "grad_norm/visual", "grad_norm/fusion"),
        *("batch_r1", "schedule", "nonfinite/total", "time/step", "time/data_wait"),
        *("time/compute", "time/clips_per_second", "time/goodput", "memory/host"),
    } <= set(train_rows[-1])
    assert [row["step"] for row in rows if "eval/sum" in row] == [8, 16, 20]
    assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == 20
    result = json.loads((workdir / "result.json").read_text())
    assert result["step"] == 20 and result["eval/sum"] == last["eval/sum"]
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["15", "20"]


@pytest.mark.parametrize("stop_at", [1, 7, 8, 15])
def test_stopped_and_resumed_is_bit_identical(whole, tmp_path, stop_at, monkeypatch):
    """Stopped by a signal after a step, and started again by the same call."""
    workdir, c, _ = whole
    asked = monitor.Stopper.should_stop
    monkeypatch.setattr(monitor.Stopper, "should_stop", lambda self, step: step == stop_at)
    assert run(tmp_path, c)["stopped"]
    assert checkpoint.load_params(tmp_path)[2]["step"] == stop_at
    assert not (tmp_path / "result.json").exists()
    monkeypatch.setattr(monitor.Stopper, "should_stop", asked)
    assert not run(tmp_path, c)["stopped"]
    assert_same_bits(everything(tmp_path, c), everything(workdir, c))
    assert metric_rows(tmp_path) == metric_rows(workdir)


def test_a_lost_process_resumes_from_the_last_checkpoint(whole, tmp_path):
    """The loader dies in step 13: steps 11 to 13 are repeated and logged once."""
    workdir, c, _ = whole

    class Dies(ToyLoader):
        def __next__(self):
            if self.step == 13:
                raise OSError("the disk of the data went away")
            return super().__next__()

    with pytest.raises(OSError, match="went away"):
        train.train(
            c, tmp_path, task=ToyTask(), build_model=build_model, open_loader=lambda s: Dies(c, s)
        )
    assert checkpoint.load_params(tmp_path)[2]["step"] == 10
    run(tmp_path, c)
    assert_same_bits(everything(tmp_path, c), everything(workdir, c))
    assert metric_rows(tmp_path) == metric_rows(workdir)


def test_a_finished_run_started_again_does_nothing(whole):
    workdir, c, last = whole
    before = (workdir / "metrics.jsonl").read_text()
    again = run(workdir, c)
    assert again["step"] == 20 and again["eval/sum"] == last["eval/sum"]
    assert (workdir / "metrics.jsonl").read_text() == before


def test_another_configuration_is_refused_by_its_keys(whole):
    workdir, _, _ = whole
    c = toy_config(eval__every_steps=8, train__accumulate=2, seed=1, optim__weight_decay=0.1)
    with pytest.raises(UserError, match=r"optim\.weight_decay 0\.2 → 0\.1; seed 0 → 1; name ano"):
        run(workdir, c)
    # Settings of where and how it runs may change.
    run(workdir, toy_config(eval__every_steps=8, train__accumulate=2, log__every_steps=2))


def test_epochs_replace_steps(tmp_path):
    c = toy_config(train__epochs=0.1)
    assert run(tmp_path, c)["step"] == 5


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path):
    c = toy_config(train__steps=3)
    program = make_program(c, ToyTask(), 3, build_model)
    loader = iter(ToyLoader(c, 0, poison=(1,)))
    states = [program.init()]
    keep = jax.jit(lambda x: jax.tree.map(lambda a: a.copy(), x))
    for _ in range(3):
        batch = sharding.to_devices(next(loader), program.mesh, 16)
        state, seen = program.step(keep(states[-1]), batch)
        states.append(state)
    first, after = checkpoint.flatten(states[1]), checkpoint.flatten(states[2])
    for name, value in first.items():
        if name.startswith(("params/", "opt_state/")):
            np.testing.assert_array_equal(value, after[name], err_msg=name)
    assert int(states[2].step) == 2 and int(states[2].skipped) == 1 and int(states[2].streak) == 1
    assert int(states[3].skipped) == 1 and int(states[3].streak) == 0
    assert np.isfinite(np.asarray(seen)).all()
    moved = checkpoint.flatten(states[3])["params/visual/kernel"]
    assert np.abs(moved - after["params/visual/kernel"]).max() > 0


def test_loading_a_checkpoint_prints_nothing(tmp_path, caplog, capfd):
    run(tmp_path, toy_config(train__steps=1))
    caplog.clear()
    capfd.readouterr()
    checkpoint.load_params(tmp_path)
    assert not caplog.records and capfd.readouterr() == ("", "")


def test_frozen_parameters_stay(tmp_path):
    c = toy_config(train__steps=3)
    c.optim.groups = ((r"^visual", 0), (r".*", 1e-2))
    program = make_program(c, ToyTask(), 3, build_model)
    before = jax.device_get(program.init().params)
    run(tmp_path, c)
    after, _, _ = checkpoint.load_params(tmp_path)
    np.testing.assert_array_equal(after["visual/kernel"], before["visual/kernel"])
    assert np.abs(after["fusion/kernel"] - before["fusion/kernel"]).max() > 0


def test_weights_that_init_path_names_are_taken(tmp_path, monkeypatch):
    import sys
    import types

    brought = {"visual/kernel": np.full((8, 16), 0.25, np.float32)}
    module = types.ModuleType("stoa_jax.weights")
    module.initial_parameters = lambda path, config, seed, reinit: (
        {name: x for name, x in brought.items() if not (reinit and re.search(reinit, name))},
        "an account",
    )
    monkeypatch.setitem(sys.modules, "stoa_jax.weights", module)
    monkeypatch.setattr("stoa_jax.weights", module, raising=False)
    c = toy_config(train__steps=1, init__path="somewhere")
    c.optim.groups = ((r".*", 0),)
    run(tmp_path / "a", c)
    params, _, _ = checkpoint.load_params(tmp_path / "a")
    np.testing.assert_array_equal(params["visual/kernel"], brought["visual/kernel"])
    c.init.reinit = r"^visual/"  # freshly initialised in any case
    run(tmp_path / "reinit", c)
    params, _, _ = checkpoint.load_params(tmp_path / "reinit")
    assert np.ptp(params["visual/kernel"]) > 0
    c.init.reinit = ""
    brought["visual/kernel"] = np.zeros((8, 2), np.float32)
    with pytest.raises(UserError, match=r"visual/kernel is \(8, 2\) in somewhere, the model has"):
        run(tmp_path / "b", c)


def test_the_best_checkpoint_stays(tmp_path):
    c = toy_config(
        eval__every_steps=4, checkpoint__best_metric="sum", checkpoint__keep=1, train__steps=12
    )
    run(tmp_path, c)
    rows = [r for r in writers.read_lines(tmp_path / "metrics.jsonl") if "eval/sum" in r]
    best = max(rows, key=lambda r: r["eval/sum"])["step"]
    kept = {int(p.name) for p in (tmp_path / "checkpoints").iterdir()}
    assert kept == {best, 12}


def test_a_best_metric_that_no_evaluation_gives_is_named(tmp_path):
    c = toy_config(checkpoint__best_metric="R@1", train__steps=2)
    with pytest.raises(UserError, match=r"best_metric: the evaluation gave no 'R@1'; it gave sum"):
        run(tmp_path, c)


def test_profile_writes_a_trace_and_nothing_else(tmp_path):
    c = toy_config()
    train.train(
        c,
        tmp_path,
        task=ToyTask(),
        build_model=build_model,
        open_loader=lambda s: ToyLoader(c, s),
        profile=True,
    )
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(train__steps=0), r"train\.steps: 0"),
        (dict(init__reinit="(fusion"), r"init\.reinit: '\(fusion' is not a reg"),
        (dict(log__every_steps=0), r"log\.every_steps: 0; it must be at least 1"),
        (dict(train__batch_size=12), r"train\.batch_size: 12 is not divisible by 8"),
        (dict(model__image_size=50), r"image_size 50 is not a multiple of patch_size 12; use 48"),
        (dict(checkpoint__keep=0), r"checkpoint\.keep"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_built(tmp_path, settings, says):
    with pytest.raises(UserError, match=says):
        run(tmp_path, toy_config(**settings))
    assert not (tmp_path / "checkpoints").exists()
