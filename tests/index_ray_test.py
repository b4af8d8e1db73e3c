"""Embedding with Ray Data on one machine: two workers, one of them killed."""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import videos as video_files
from clip_tiny import FOLDER

import stoa_jax
from stoa_jax.index import ray_job, session

ray = pytest.importorskip("ray")
REPO = Path(__file__).resolve().parents[1]


def worker_pids() -> list[int]:
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if "ray::MapWorker" in line]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("backend", ["flat", "lance"])
def test_a_killed_worker_loses_nothing(backend, tmp_path, monkeypatch):
    if backend == "lance":
        pytest.importorskip("lancedb")
    for i in range(24):
        video_files.write(tmp_path / f"v{i:02}.mp4", count=36 + 72 * (i % 3), rate=6)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    files = sorted(map(str, tmp_path.glob("*.mp4")))
    model = stoa_jax.load(FOLDER)
    whole = stoa_jax.Index.create(tmp_path / "whole", model)
    whole.add(files)
    index = stoa_jax.Index.create(tmp_path / "index", model, backend=backend)
    monkeypatch.setattr(session, "COMMIT_ROWS", 4)
    environment = {"PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu"}
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": environment},
    )
    killed = []

    def kill_one():
        while not len(stoa_jax.Index.open(tmp_path / "index")):
            time.sleep(0.1)
        victim = worker_pids()[0]
        os.kill(victim, signal.SIGKILL)
        killed.append(victim)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    try:
        added = ray_job.add(index, str(FOLDER), files, workers=2)
        assert added == stoa_jax.Added(24, 0, 1) and killed
        assert ray_job.add(index, str(FOLDER), files[1:]) == stoa_jax.Added(0, 24, 0)
    finally:
        ray.shutdown()
    found, wanted = (
        {(hit.id, hit.start, hit.end): hit.score for hit in one.search("a dog runs", 100)}
        for one in (index, whole)
    )
    assert found == pytest.approx(wanted, abs=1e-5)
