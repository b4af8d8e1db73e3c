"""Every fault that a run must survive, injected into one process; see also `multiprocess_test`."""

import errno
import fcntl
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from toy_run import compiled_once, run, toy_config

from stoa_jax import checkpoint, train, workdir, writers
from stoa_jax.errors import UserError

HERE = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def compilations(tmp_path_factory):
    with compiled_once(tmp_path_factory.mktemp("compiled")):
        yield


def start(workdir, *arguments, settings=()):
    """Start the toy in a separate process."""
    command = [sys.executable, str(HERE / "support" / "toy_run.py"), str(workdir)]
    return subprocess.Popen(
        [*command, *arguments, *(["--set", *settings] if settings else [])],
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, seconds=120):
    _, printed = process.communicate(timeout=seconds)
    return process.returncode, printed


def steps_of(workdir):
    folder = workdir / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


# Non-finite losses.


def test_one_bad_step_is_left_out_and_the_run_goes_on(tmp_path):
    last = run(tmp_path, toy_config(train__steps=8), poison=(3,))
    rows = writers.read_lines(tmp_path / "metrics.jsonl")
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert np.isnan(losses.pop(4)) and np.isfinite(list(losses.values())).all()
    assert last["nonfinite/total"] == 1 and last["nonfinite/rollbacks"] == 0


def test_many_in_a_row_roll_back_and_skip_that_stretch_of_data(tmp_path, caplog):
    c = toy_config(train__steps=12, faults__max_nonfinite=3)
    last = run(tmp_path, c, poison=(6, 7, 8))
    assert last["step"] == 12 and last["nonfinite/rollbacks"] == 1
    assert "rolled back from step 9 to 5; training continues with batch 9" in caplog.text
    params, _, meta = checkpoint.load_params(tmp_path)
    assert meta["offset"] == 4
    # Equal to a run whose data never contained these batches.
    other = toy_config(train__steps=12)

    class Without(train_loader()):
        def __next__(self):
            if self.step == 5:
                self.step = 9
            return super().__next__()

    train.train(
        other,
        tmp_path / "other",
        **toy_parts(lambda start: Without(other, start)),
    )
    expected, _, _ = checkpoint.load_params(tmp_path / "other")
    for name in expected:
        assert params[name].tobytes() == expected[name].tobytes(), name


def train_loader():
    from toy_run import ToyLoader

    return ToyLoader


def toy_parts(open_loader):
    from toy_run import ToyTask, build_model

    return dict(task=ToyTask(), build_model=build_model, open_loader=open_loader)


def test_without_a_checkpoint_it_rolls_back_to_the_beginning(tmp_path, caplog):
    c = toy_config(train__steps=6, faults__max_nonfinite=2)
    last = run(tmp_path, c, poison=(0, 1))
    assert last["step"] == 6 and last["nonfinite/rollbacks"] == 1
    assert "rolled back from step 2 to 0; training continues with batch 2" in caplog.text


def test_roll_backs_are_bounded(tmp_path):
    c = toy_config(train__steps=50, faults__max_nonfinite=2, faults__max_rollbacks=2)
    with pytest.raises(train.TrainingError, match=r"2 times in a row, after 2 roll-backs"):
        run(tmp_path, c, poison=range(6, 1000))
    assert steps_of(tmp_path)[-1] == 5


# Disk.


def test_a_full_disk_stops_with_one_line_and_keeps_the_last_good_one(tmp_path, monkeypatch):
    save = checkpoint.Checkpoints.save

    def fill_up(self, step, *args, **kwargs):
        def refuse(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        if step == 10:
            monkeypatch.setattr(self._manager, "save", refuse)
        return save(self, step, *args, **kwargs)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", fill_up)
    with pytest.raises(UserError, match=r"checkpoint 10 could not be written.*is step 5; free"):
        run(tmp_path, toy_config(train__steps=10))
    monkeypatch.undo()
    assert steps_of(tmp_path) == [5]
    assert run(tmp_path, toy_config(train__steps=10))["step"] == 10


def test_a_full_disk_for_real(tmp_path):
    """The operating system refuses what TensorStore writes beyond 3000 bytes per file."""
    run(tmp_path, toy_config(train__steps=5))
    c = json.loads((tmp_path / "config.json").read_text())
    c["train"]["steps"] = 10  # the run continues with the config.json that it will have
    c["log"]["every_steps"] = 1000
    (tmp_path / "config.json").write_text(json.dumps(c))
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "result.json").unlink()
    code, printed = finish(
        start(
            tmp_path,
            *("--devices", "8", "--largest-file", "3000"),
            settings=("train.steps=10", "log.every_steps=1000"),
        )
    )
    assert code == 2, printed
    assert re.search(r"checkpoint 10 could not be written: no space left.*is step 5; free", printed)
    assert steps_of(tmp_path) == [5] and not (tmp_path / "result.json").exists()
    assert checkpoint.load_params(tmp_path)[2]["step"] == 5
    assert run(tmp_path, toy_config(train__steps=10))["step"] == 10


def test_a_damaged_newest_checkpoint_costs_its_steps_only(tmp_path, caplog):
    c = toy_config(train__steps=10)
    first = run(tmp_path, c)
    for path in (tmp_path / "checkpoints" / "10" / "params").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-9] + b"corrupted")
    again = run(tmp_path, c)
    assert "checkpoint 10 is damaged" in caplog.text
    assert again["loss"] == first["loss"] and steps_of(tmp_path) == [5, 10]


# Signals.


def test_sigterm_saves_the_step_and_exits_with_0(tmp_path):
    process = start(
        tmp_path,
        *("--signal", "SIGTERM:step3"),
        settings=("train.steps=100000", "checkpoint.every_steps=100000"),
    )
    begun = time.monotonic()
    code, printed = finish(process)
    assert code == 0, printed
    (step,) = steps_of(tmp_path)
    assert step >= 3 and f"saved step {step}; run the same command again" in printed
    assert time.monotonic() - begun < 60


def test_sigterm_within_an_evaluation_does_not_wait_for_its_end(tmp_path, monkeypatch):
    from toy_run import ToyTask

    def evaluators(self):
        def evaluate(model, mesh):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
            yield "sum", 0.0

        return {"slow": evaluate}

    c = toy_config(train__steps=4)
    with monkeypatch.context() as patch:
        patch.setattr(ToyTask, "evaluators", evaluators)
        begun = time.monotonic()
        assert run(tmp_path, c)["stopped"]
        assert time.monotonic() - begun < 30
    assert steps_of(tmp_path) == [4]
    assert "eval/sum" in run(tmp_path, c)  # the missing evaluation is made up for


def test_not_saved_in_the_grace_period_is_said(tmp_path):
    process = start(
        tmp_path,
        *("--signal", "SIGTERM:6", "--loader", json.dumps({"stall_at": 3})),
        settings=("faults.grace_seconds=2", "data.prefetch=0"),
    )
    code, printed = finish(process)
    assert code == 3
    assert "not saved within faults.grace_seconds=2 of SIGTERM" in printed
    assert "toy_run.py" in printed


def test_a_stalled_loader_ends_the_run_with_every_stack(tmp_path):
    process = start(
        tmp_path,
        *("--loader", json.dumps({"stall_at": 6})),
        settings=("faults.stall_seconds=6", "checkpoint.every_steps=3"),
    )
    code, printed = finish(process)
    assert code == 3
    assert "no progress for 6 s (faults.stall_seconds) while after step" in printed
    assert "in __next__" in printed and "toy_run.py" in printed
    assert "in __next__" in (tmp_path / "stacks-0.txt").read_text()
    assert steps_of(tmp_path)[-1] in (3, 6)


@pytest.mark.slow
def test_kill_9_at_any_moment_and_within_a_save_loses_nothing(tmp_path):
    """Five kills, two of them during a checkpoint; the final arrays are bit-identical."""
    settings = ("train.steps=60", "checkpoint.every_steps=2", "eval.every_steps=20")
    assert finish(start(tmp_path / "whole", settings=settings))[0] == 0
    draw = random.Random(0)
    for when in ("save", "step3", "save", "step7", f"{draw.uniform(2, 4):.2f}"):
        process = start(tmp_path / "killed", "--signal", f"SIGKILL:{when}", settings=settings)
        code, printed = finish(process)
        assert code in (-signal.SIGKILL, 0), printed
    code, printed = finish(start(tmp_path / "killed", settings=settings))
    assert code == 0, printed
    a, _, _ = checkpoint.load_params(tmp_path / "whole")
    b, _, _ = checkpoint.load_params(tmp_path / "killed")
    for name in a:
        assert a[name].tobytes() == b[name].tobytes(), name
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")


def losses(workdir):
    rows = writers.read_lines(workdir / "metrics.jsonl")
    return [(row["step"], row.get("loss"), row.get("eval/sum")) for row in rows]


def test_the_process_can_be_started_here(tmp_path):
    """The other tests rely on this: the toy gives the same result in a separate process."""
    assert jax.device_count() == 8
    code, printed = finish(start(tmp_path / "a", "--devices", "8", settings=("train.steps=5",)))
    assert code == 0, printed
    run(tmp_path / "b", toy_config(train__steps=5))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_a_second_training_in_the_same_directory_is_refused(tmp_path):
    process = start(tmp_path, settings=("train.steps=1000000",))
    try:
        deadline = time.monotonic() + 100
        while not (tmp_path / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        before = (tmp_path / "metrics.jsonl").read_bytes()
        said = rf"process {process.pid} on \S+ is writing to it \(training, since"
        with pytest.raises(UserError, match=said):
            run(tmp_path, toy_config(train__steps=1000000))
        assert (tmp_path / "metrics.jsonl").read_bytes().startswith(before)
    finally:
        process.kill()
        process.communicate()
    with workdir.only_training(tmp_path):  # the lock ended with the process
        pass


def test_without_locks_training_goes_on_with_a_warning(tmp_path, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with workdir.only_training(tmp_path):
        pass
    assert "cannot be locked (Operation not supported); do not start a second" in caplog.text
