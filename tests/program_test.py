"""The step alone: packages that it must not need."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

SCRIPT = """
import sys
from types import SimpleNamespace as Section

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent}:
            raise ImportError(f"{{name}} is not there")

sys.meta_path.insert(0, Absent())
sys.path.insert(0, "tests/support")

import numpy as np
import jax
from toy_run import RealLoader, RealTask
from stoa_jax import sharding
from stoa_jax.program import make_program

class Weights(Section):
    def to_dict(self):
        return vars(self)

c = Section(
    seed=0,
    loss=Weights(vtc=1.0, vtm=1.0, mlm=1.0, plm=1.0, ota=1.0, asp=1.0, verb=0.0, mask_rate=0.15,
                 proper_nouns=False, matching="device", none_weight=1.0, target="sentence",
                 match_names=False, seen_words=False),
    train=Section(batch_size=8, accumulate=1),
    mesh=dict(data=-1, fsdp=1, tensor=1),
    optim=Section(groups=((".*", 1e-3),), weight_decay=0.2, no_decay="bias$", betas=(0.9, 0.98),
                  clip_norm=1.0, warmup=0.1, schedule="cosine"),
)
program = make_program(c, RealTask(c), 10, devices=jax.devices()[:1])
batch = next(iter(RealLoader(c, 0)))
state, figures = program.step(program.init(), sharding.to_devices(batch, program.mesh, 8))
names = dict(zip(program.metrics, np.asarray(figures).tolist()))
assert int(state.step) == 1 and int(state.skipped) == 0, names
print(jax.__version__, sorted(n for n in names if n.startswith("loss")))
"""
ABSENT = ("grain", "tensorflow", "tensorflow_datasets", "clu", "ml_collections", "spacy", "orbax")


@pytest.mark.slow
def test_the_step_runs_where_only_jax_flax_and_optax_are():
    """All six losses and an update, without any of the data and config packages."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(absent=ABSENT)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert jax.__version__ in done.stdout and "loss_asp" in done.stdout
