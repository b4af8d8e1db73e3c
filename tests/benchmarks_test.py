"""Every benchmark runs at toy sizes; each compares its sides' results itself."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("roi_align", "| ours |"),
        ("matching", "scipy in a loop"),
        pytest.param("cache", "cache=memory, center crop", marks=pytest.mark.slow),
        pytest.param("loader", "Loader, random crop in training", marks=pytest.mark.slow),
        pytest.param("growth", "T, frames", marks=pytest.mark.slow),
        pytest.param("captioning", "without cache", marks=pytest.mark.slow),
        pytest.param("questions", "once for every question", marks=pytest.mark.slow),
        pytest.param("encode", "ONNX Runtime", marks=pytest.mark.slow),
        pytest.param("start", "import stoa_jax", marks=pytest.mark.slow),
    ],
)
def test_a_benchmark_runs(name, says):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--smoke"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert says in ran.stdout
