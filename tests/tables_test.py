"""The paper's tables as one command, shortened: from a small CLIP to a table, all real."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SHORT = """
import importlib.util
spec = importlib.util.spec_from_file_location("paper_tables", {path!r})
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)
report = tables.report

def sweep():
    runs = tables.sweep("synthetic,table4,seeds=1")
    runs = [r for r in runs if "| qa:" in r["name"]]
    runs = [r for r in runs if any(row in r["name"] for row in ("base", "full"))]
    for run in runs:
        for stage in run["stages"]:
            if "overrides" in stage:
                stage["overrides"] |= {{"train.steps": 2, "train.batch_size": 8}}
    return runs
"""


@pytest.mark.slow
def test_base_and_full_model_from_a_small_clip_to_the_table(tmp_path):
    user = {**os.environ, "XLA_FLAGS": "", "STOA_DATA": str(tmp_path / "data")}
    world = ["--option=size=48", "--option=max_objects=3", "--short-side=48", "--objects=6"]
    counts = [f"--option={split}=40" for split in ("train", "validation", "test")]
    for dataset, frames in (("pictures", 1), ("captions", 4), ("qa", 4)):
        build = [sys.executable, "-m", "stoa_jax.data.build", f"synthetic/{dataset}", "--quiet"]
        build += [f"--data-dir={tmp_path / 'data'}", f"--frames={frames}", *world, *counts]
        subprocess.run(build, check=True, env=user, timeout=300)
    config = tmp_path / "short.py"
    config.write_text(SHORT.format(path=str(ROOT / "configs" / "paper_tables.py")))
    command = [sys.executable, "-m", "stoa_jax.sweep", f"--config={config}"]
    command += [f"--workdir={tmp_path / 'runs'}", "--parallel=2"]
    ran = subprocess.run(command, capture_output=True, text=True, env=user, timeout=900)
    logs = "".join(path.read_text()[-600:] for path in (tmp_path / "runs").glob("*.log"))
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:] + logs
    table = (tmp_path / "runs" / "tables.md").read_text()
    assert "base" in table and "+ ASP (full)" in table
    rows = json.loads((tmp_path / "runs" / "sweep.json").read_text())["runs"]
    assert len(rows) == 2 and all(row["done"] for row in rows)
