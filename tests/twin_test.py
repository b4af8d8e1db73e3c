"""The PyTorch twin of the benchmarks: its losses and gradients are ours."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import parity, setting

pytestmark = pytest.mark.torch

CLIPS = 5


@pytest.fixture(scope="module")
def ours():
    return parity.our_losses(setting.toy(), CLIPS, jax.devices()[0])


@pytest.mark.parametrize("authors", [False, True], ids=["twin", "as the authors do"])
def test_six_losses_and_all_gradients_are_ours(ours, authors):
    losses, gradients = parity.twin_losses(ours, authors=authors)
    assert sorted(losses) == sorted(setting.LOSSES)
    for name, value in ours.losses.items():
        np.testing.assert_allclose(losses[name], value, rtol=1e-5, err_msg=name)
    for name, gradient in ours.gradients.items():
        largest = np.abs(gradient).max()
        assert largest > 0, name
        np.testing.assert_allclose(gradients[name], gradient, atol=1e-4 * largest, err_msg=name)


def test_a_step_of_the_twin_lowers_the_loss_by_its_own_choices():
    import torch

    from benchmarks.twin.step import TwinStep

    c = setting.toy()
    config = setting.step_config(CLIPS, groups=((r".*", 3e-3),))
    program, _ = setting.our_program(c, config, jax.devices()[0])
    torch.manual_seed(0)
    step = TwinStep(c, setting.random_parameters(program), config)
    batch = step.batch(setting.random_batch(c, CLIPS))
    losses = [float(step(batch)) for _ in range(12)]
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])


ABSENT = ("grain", "tensorflow", "tensorflow_datasets", "clu", "ml_collections", "spacy", "cv2")
# Runs a module as `python -m` does, where the packages above cannot be imported.
RUN = f"""
import runpy, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT}:
            raise ImportError(f"{{name}} is not there")

sys.meta_path.insert(0, Absent())
runpy.run_module(sys.argv.pop(1), run_name="__main__")
"""


def dry_run(module: str, folder: Path) -> dict[str, dict]:
    """The results by name."""
    out = folder / "results.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", RUN, module, "--dry-run", f"--out={out}"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    return {line.pop("result"): line for line in lines}


def test_the_gpu_benchmark_runs_dry_where_only_jax_and_torch_are(tmp_path):
    found = dry_run("benchmarks.gpu", tmp_path)
    assert max(found["parity with the twin here"][x] for x in ("losses", "gradients")) < 1e-4
    assert found["ratio"]["ratio"] > 0
    for name in ("ours as shipped", "twin, compiled", "twin, eager", "remat=products"):
        assert found[name]["clips_per_second"] > 0
    # What cannot run on a CPU is one line, and nothing else fails.
    failed = {name for name, line in found.items() if "error" in line}
    assert failed == {name for name in found if name.startswith("attention=cudnn")}
    assert "part ViT" in found and "all stages are done" in str(found["end"])
