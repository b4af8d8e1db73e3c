"""Two processes on `jax.distributed`: the numbers of one, and what one's death does to both."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from stoa_jax import checkpoint, writers

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow

FOREVER = ("train.steps=1000000", "checkpoint.every_steps=1000000", "log.every_steps=5")


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start(workdir, settings=(), processes=2, devices=2, arguments=({}, {})):
    """Start processes of one run; return them and the files of their output."""
    port, started = free_port(), []
    for process in range(processes):
        command = [sys.executable, str(HERE / "support" / "toy_run.py"), str(workdir)]
        command += ["--processes", str(processes), "--process", str(process)]
        command += ["--port", str(port), "--devices", str(devices)]
        for name, value in arguments[process].items():
            command += [f"--{name}", *([] if value is None else [value])]
        if settings:
            command += ["--set", *settings]
        printed = open(f"{workdir}.{process}.log", "w+")
        started.append((subprocess.Popen(command, stderr=printed, stdout=printed), printed))
    return started


def finish(started, seconds=150):
    """Return exit codes and output; no process may hang."""
    found, end = [], time.monotonic() + seconds
    for process, printed in started:
        try:
            process.wait(max(end - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        printed.seek(0)
        found.append((process.returncode, printed.read()))
        printed.close()
    return found


def steps_of(workdir):
    folder = workdir / "checkpoints"
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())


def metric_rows(workdir):
    rows = [r for r in writers.read_lines(workdir / "metrics.jsonl") if "loss" in r]
    names = [n for n in rows[0] if not n.startswith(("time/", "memory/"))]
    return np.array([[row[name] for name in names] for row in rows])


def same_params(a, b, **tolerance):
    one, other = checkpoint.load_params(a)[0], checkpoint.load_params(b)[0]
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], **tolerance, err_msg=name)


def test_two_processes_of_four_devices_are_one_process(tmp_path):
    """Ten steps, data-parallel and with FSDP across the processes, against one device."""
    settings = ("train.steps=10",)
    one = finish(start(tmp_path / "one", settings, 1, 1, ({},)))
    assert one[0][0] == 0, one
    for name, mesh in (("dp", ()), ("fsdp", ("mesh.data=2", "mesh.fsdp=4"))):
        two = finish(start(tmp_path / name, (*settings, *mesh), 2, 4))
        assert [code for code, _ in two] == [0, 0], two
        np.testing.assert_allclose(
            metric_rows(tmp_path / name), metric_rows(tmp_path / "one"), rtol=1e-5, atol=1e-5
        )
        same_params(tmp_path / name, tmp_path / "one", rtol=1e-5, atol=1e-5)


def test_the_real_model_on_two_processes_is_one_process(tmp_path):
    """All six losses, with random choices and negatives over the global batch."""
    settings = ("train.steps=10",)
    one = finish(start(tmp_path / "one", settings, 1, 1, ({"real": None},)), 280)
    assert one[0][0] == 0, one
    two = finish(start(tmp_path / "two", settings, 2, 4, ({"real": None},) * 2), 280)
    assert [code for code, _ in two] == [0, 0], two
    ours, theirs = metric_rows(tmp_path / "two"), metric_rows(tmp_path / "one")
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_sigterm_to_one_saves_the_same_step_on_both_and_resumes_on_one_process(tmp_path):
    """The second process, not the coordinator, gets the signal; the final state is the same."""
    settings = ("train.steps=60", "checkpoint.every_steps=1000", "log.every_steps=1")
    slow = {"loader": json.dumps({"wait": 0.05})}
    both = start(
        tmp_path / "stopped", settings, arguments=(slow, {**slow, "signal": "SIGTERM:step5"})
    )
    begun = time.monotonic()
    found = finish(both)
    assert [code for code, _ in found] == [0, 0], found
    assert time.monotonic() - begun < 60
    (step,) = steps_of(tmp_path / "stopped")
    assert 5 <= step < 60
    for _, printed in found:
        assert f"saved step {step}; run the same command again" in printed
    # Continued with as many processes: bit-identical to an uninterrupted run.
    assert [code for code, _ in finish(start(tmp_path / "whole", settings))] == [0, 0]
    assert [code for code, _ in finish(start(tmp_path / "stopped", settings))] == [0, 0]
    same_params(tmp_path / "stopped", tmp_path / "whole", rtol=0, atol=0)
    np.testing.assert_array_equal(
        metric_rows(tmp_path / "stopped"), metric_rows(tmp_path / "whole")
    )


@pytest.mark.parametrize(("processes", "devices"), [(1, 4), (1, 1), (2, 4)])
def test_goes_on_with_another_number_of_processes_and_devices(tmp_path, processes, devices):
    settings = ("train.steps=20", "checkpoint.every_steps=10", "checkpoint.keep=2")
    mesh = ("mesh.data=2", "mesh.fsdp=-1") if devices > 1 else ()
    assert [c for c, _ in finish(start(tmp_path / "a", (*settings, "mesh.fsdp=2")))] == [0, 0]
    checkpoints = tmp_path / "a" / "checkpoints"
    os.rename(checkpoints / "20", tmp_path / "kept")
    expected = metric_rows(tmp_path / "a")
    found = finish(start(tmp_path / "a", (*settings, *mesh), processes, devices))
    assert [code for code, _ in found] == [0] * processes, found
    assert "continuing from step 10" in found[0][1]
    np.testing.assert_allclose(metric_rows(tmp_path / "a"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_peer_ends_the_other(tmp_path, victim):
    arguments = [{}, {}]
    arguments[victim] = {"signal": "SIGKILL:step3"}
    begun = time.monotonic()
    found = finish(start(tmp_path / "run", FOREVER, arguments=arguments), seconds=120)
    assert found[victim][0] == -signal.SIGKILL
    assert found[1 - victim][0] not in (0, -signal.SIGKILL), "it hung, and the test killed it"
    assert time.monotonic() - begun < 100


def test_kill_9_of_one_within_a_save_leaves_the_last_good_step(tmp_path):
    settings = ("train.steps=40", "checkpoint.every_steps=4", "log.every_steps=1")
    found = finish(start(tmp_path / "run", settings, arguments=({}, {"signal": "SIGKILL:save"})))
    assert found[1][0] == -signal.SIGKILL and found[0][0] != 0, found
    found = finish(start(tmp_path / "run", settings))
    assert [code for code, _ in found] == [0, 0], found
    assert finish(start(tmp_path / "whole", settings))[0][0] == 0
    same_params(tmp_path / "run", tmp_path / "whole", rtol=0, atol=0)


def test_a_stalled_collective_dumps_the_stacks_and_ends_both(tmp_path):
    """One process never brings its batch; the other waits in the step's collective."""
    arguments = ({}, {"loader": json.dumps({"stall_at": 8})})
    settings = ("train.steps=100", "faults.stall_seconds=8", "data.prefetch=0")
    found = finish(start(tmp_path / "run", settings, arguments=arguments))
    assert all(code not in (0, -signal.SIGKILL) for code, _ in found), found
    assert any("no progress for 8 s" in printed for _, printed in found)
    stacks = [path.read_text() for path in tmp_path.glob("run/stacks-*.txt")]
    assert stacks and all("train.py" in text for text in stacks)


def test_a_damaged_newest_checkpoint_is_set_aside_by_both(tmp_path):
    settings = ("train.steps=10", "checkpoint.every_steps=5")
    assert [code for code, _ in finish(start(tmp_path / "run", settings))] == [0, 0]
    expected = metric_rows(tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints" / "10" / "params").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-9] + b"corrupted")
    found = finish(start(tmp_path / "run", settings))
    assert [code for code, _ in found] == [0, 0], found
    assert re.search(r"checkpoint 10 is damaged", found[0][1])
    assert steps_of(tmp_path / "run") == [5, 10]
    np.testing.assert_array_equal(metric_rows(tmp_path / "run"), expected)
