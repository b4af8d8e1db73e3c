"""The demonstration as a user starts it, shortened: every stage, the table and the page."""

import json
import os
import subprocess
import sys

import pytest

from stoa_jax.demo import report


@pytest.mark.slow
def test_the_demo_runs_through_and_a_second_time_does_nothing_again(tmp_path):
    command = [sys.executable, "-m", "stoa_jax.demo", f"--workdir={tmp_path}"]
    command += ["--steps=0.01", "--clips=0.01"]
    user = {**os.environ, "XLA_FLAGS": ""}  # the tests' eight devices are not a user's
    first = subprocess.run(command, capture_output=True, text=True, timeout=800, env=user)
    assert first.returncode == 0, first.stderr[-2000:]
    table = (tmp_path / "results.md").read_text()
    assert table in first.stdout and table.count("\n") == 2 + len(report.LINES)
    assert all(what in table for _, what, *_ in report.LINES)
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/") > 10 and "multiple choice" in page
    checkpoints = sorted(tmp_path.glob("*/checkpoints/*"))
    stages = {path.parts[-3] for path in checkpoints}
    assert stages == {"clip", "pretrain", "retrieval", "captioning", "qa", "multiple_choice"}
    for stage in stages:
        assert json.loads((tmp_path / stage / "result.json").read_text())["step"] >= 2

    before = {path: path.stat().st_mtime_ns for path in checkpoints}
    second = subprocess.run(command, capture_output=True, text=True, timeout=800, env=user)
    assert second.returncode == 0, second.stderr[-2000:]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (tmp_path / "results.md").read_text() == table
