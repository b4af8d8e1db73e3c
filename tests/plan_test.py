"""The plan's counts against independent counts."""

import dataclasses
import functools
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from toy_run import ToyConfig, ToyTask, build_model, compiled_once, toy_config

from stoa_jax import config, cost, plan, sharding
from stoa_jax.data.pipeline import BatchSpec
from stoa_jax.errors import UserError
from stoa_jax.joint_loss import joint_loss
from stoa_jax.program import make_program


@pytest.fixture(scope="module", autouse=True)
def compilations(tmp_path_factory):
    with compiled_once(tmp_path_factory.mktemp("compiled")):
        yield


TOY_BATCH = {
    "x": jax.ShapeDtypeStruct((16, 8), jnp.float32),
    "index": jax.ShapeDtypeStruct((16,), jnp.int32),
}


class Joint:
    """Pre-training's loss on an abstract batch; no data set is opened."""

    def __init__(self, c):
        self.c = c

    def model_config(self):
        return config.model_config(self.c)

    def batch_spec(self, train):
        m = self.model_config()
        return BatchSpec(
            frames=m.frames,
            image_size=m.image_size,
            objects=m.objects_per_frame,
            text_length=m.text_length,
            vocab_size=m.vocab_size,
        )

    def loss(self, model, batch, key):
        return joint_loss(model, batch, key, self.c.loss.to_dict())


@pytest.mark.parametrize(
    ("text", "count", "hosts"),
    [("v5e:16x16", 256, 64), ("v5p:4x4x8", 128, 32), ("gpu:8", 8, 1), ("h200:16", 16, 2)],
)
def test_topologies(text, count, hosts):
    topology = plan.parse_topology(text)
    assert (topology.count, topology.hosts) == (count, hosts)


@pytest.mark.parametrize("text", ["v5e", "v9:2x2", "gpu:", "cpu:8x", ""])
def test_an_unknown_topology_is_one_line(text):
    with pytest.raises(UserError, match="write KIND:SHAPE, for example v5e:16x16"):
        plan.parse_topology(text)


@pytest.mark.slow
def test_work_of_the_real_step_is_the_unrolled_programs():
    """Compare our count of the scanned step with the compiler's count of the unrolled one."""
    flops = []
    for scan in (True, False):
        c = config.default(variant="tiny")
        c.train.batch_size = 8
        c.model.scan_layers = scan
        task = Joint(c)
        program = make_program(c, task, 10, devices=jax.devices()[:1])
        with jax.set_mesh(program.mesh):
            traced = program.step.trace(program.state, plan.abstract_batch(task, 8))
        flops.append(cost.jaxpr_work(traced.jaxpr.jaxpr).flops)
        counted = traced.lower().cost_analysis()["flops"]
    assert flops[0] == flops[1]
    # The compiler also counts operations that are not products: norms, softmax, the optimizer.
    assert flops[0] == pytest.approx(counted, rel=0.15) and flops[0] < counted


def collectives_of(c, task, batch, build=None):
    program = make_program(c, task, 10, *([build] if build else []))
    with jax.set_mesh(program.mesh):
        compiled = program.step.lower(program.state, batch).compile(compiler_options=plan.QUICK)
    return program, list(cost.collectives(compiled.as_text()))


def assert_only_gradients_and_exchange(program, found, clip_size):
    """Check that every array is a parameter or a gradient, or as small as a clip's features.

    Parameter and gradient may be those of one layer of a stack.
    """
    batch, features = clip_size
    sizes = set()
    for name, p in program.state.params.items():
        shape = tuple(p.shape)
        layers = {shape[1:], (1, *shape[1:])} if "blocks/" in name else set()
        sizes |= {math.prod(s) for s in ({shape} | layers)}
    split = program.mesh.shape["fsdp"] > 1
    reduced = 0
    for collective in found:
        for _, shape in collective.shapes:
            size = math.prod(shape)
            gradient = collective.kind in ("all-reduce", "reduce-scatter") and size in sizes
            parameter = split and collective.kind == "all-gather" and size in sizes
            reduced += gradient * size * collective.times
            exchanged = size <= batch * features
            assert gradient or parameter or exchanged, (collective.kind, shape, collective.source)
    return reduced


def test_the_compiled_toy_step_holds_the_gradients_all_reduce_and_the_batch_exchange():
    c = toy_config()
    program, found = collectives_of(c, ToyTask(), TOY_BATCH, build_model)
    reduced = assert_only_gradients_and_exchange(program, found, (16, 8))
    assert reduced >= sum(p.size for p in program.state.params.values())
    assert {x.kind for x in found} <= {"all-reduce", "all-gather"}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{}, dict(data=2, fsdp=4)])
def test_the_compiled_step_holds_the_gradients_and_the_vtc_and_vtm_exchange_only(sizes):
    """Eight devices, the real losses: no pixels, no patches, no matching between devices."""
    c = config.default(variant="tiny")
    c.train.batch_size = 16
    c.mesh.update(sizes)
    c.model.image_size = 72  # with fewer patches they would be no larger than what may be exchanged
    task = Joint(c)
    m = task.model_config()
    program, found = collectives_of(c, task, plan.abstract_batch(task, 16))
    # The largest array that a clip may send to another is its text or its fusion input.
    features = (m.visual_length + m.text_length) * m.text_width
    assert features < m.frames * m.grid**2 * m.vision_width / 4
    reduced = assert_only_gradients_and_exchange(program, found, (16, features))
    whole = sum(p.size for p in program.state.params.values())
    assert whole <= reduced <= whole + 4 * program.state.params["text/token_embedding"].size
    assert not [x for x in found if "assign" in x.source or "roi_align" in x.source]


def test_a_plan_for_the_devices_here():
    found = plan.make_plan(
        toy_config(), ToyTask(), plan.parse_topology("cpu:8"), TOY_BATCH, build_model
    )
    assert found.clips == 16 and found.steps == 20 and found.mesh["data"] == 8
    sizes = [8 * 16, 16, 16 * 8, 8]
    assert found.state_bytes >= 3 * 4 * sum(sizes)
    assert found.memory_bytes > found.state_bytes
    # Forward and backward of two layers and of the similarities.
    assert found.flops * 8 >= 3 * 2 * 16 * (8 * 16 + 16 * 8)
    text = plan.describe(found)
    assert "cpu:8: 8 × virtual CPU device, 1 host(s); mesh data=8 fsdp=1 tensor=1" in text
    assert "all-reduce" in text and "roofline" not in text


def test_a_plan_for_gpus_says_what_is_an_estimate():
    found = plan.make_plan(
        toy_config(), ToyTask(), plan.parse_topology("gpu:8"), TOY_BATCH, build_model
    )
    text = plan.describe(found)
    assert "NVIDIA H100" in text and "note: memory is an estimate by the CPU compiler" in text
    assert "roofline" in text and "clips/s" in text and found.fits


def test_it_says_whether_it_fits_and_what_would():
    found = plan.make_plan(
        toy_config(), ToyTask(), plan.parse_topology("gpu:8"), TOY_BATCH, build_model
    )
    small = dataclasses.replace(found.topology.chip, memory=1000.0)
    small = dataclasses.replace(found.topology, chip=small)
    assert not dataclasses.replace(found, topology=small).fits
    c = config.default(variant="tiny")
    offered = dict(plan.alternatives(c, plan.parse_topology("gpu:8")))
    assert list(offered) == [
        "model.remat=full",
        "train.accumulate=4",
        "mesh.data=1 mesh.fsdp=-1",
        "model.remat=full mesh.data=1 mesh.fsdp=-1",
    ]
    assert offered["model.remat=full"].model.remat == "full" and c.model.remat == "none"
    assert offered["train.accumulate=4"].train.accumulate == 4


def test_what_would_make_it_fit_is_compiled_and_named(monkeypatch):
    """Chips with slightly too little memory: sharding the parameters is enough."""
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 1)
    c, topology = toy_config(), "gpu:8"
    wide = functools.partial(build_model, ToyConfig(width=4096))
    parts = dict(batch=TOY_BATCH, build_model=lambda _, rngs: wide(rngs=rngs))
    needed = plan.make_plan(c, ToyTask(), plan.parse_topology(topology), **parts).memory_bytes
    chip = dataclasses.replace(plan.CHIPS["h100"], memory=0.8 * needed / plan.USABLE)
    monkeypatch.setitem(plan.CHIPS, "h100", chip)
    text = plan.report(c, topology, ToyTask(), **parts)
    before, _, after = text.partition("It does not fit. Alternatives:\n")
    assert "per chip" in before
    verdicts = dict(line.strip().split(": ") for line in after.splitlines())
    assert verdicts["model.remat=full"].endswith("per chip, does not fit")  # the toy has no layers
    assert re.search("per chip, fits, roofline .* per step", verdicts["mesh.data=1 mesh.fsdp=-1"])
    assert {"train.accumulate=2", "model.remat=full mesh.data=1 mesh.fsdp=-1"} < set(verdicts)


def test_what_a_tpus_compiler_says_when_it_runs_out_of_memory():
    said = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (38.55G) exceeds available HBM (15.75G). HLO module: jit_step"
    )
    assert plan.temporaries(said) == 38.55 * 2**30
    assert plan.temporaries("INTERNAL: something else (38.55G)") is None


@pytest.mark.slow
def test_the_plan_of_a_shipped_configuration_as_a_command(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "stoa_jax.main", "--mode=plan", "--topology=cpu:2"),
            *("--config=configs/pretrain.py:synthetic", "--config.train.batch_size=8"),
        ],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "cpu:2: 2 × virtual CPU device" in done.stdout
    assert "all-reduce" in done.stdout and "It fits." in done.stdout


def test_steps_of_a_run_without_the_data(tmp_path):
    c = config.default()
    c.data.dir = str(tmp_path)
    c.train.epochs, c.train.batch_size = 10.0, 1024
    c.data.sets = (("webvid/captions", 1.0),)
    steps, notes = plan.run_steps(c)
    assert steps == 24316 and "assumed to have 2,490,000 clips" in notes[0]


@pytest.mark.tpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_a_plan_for_a_tpu_that_is_not_here(topology):
    found = plan.make_plan(
        toy_config(), ToyTask(), plan.parse_topology(topology), TOY_BATCH, build_model
    )
    assert found.mesh["data"] == 4 and found.fits
    assert "all-reduce" in {x.kind for x in found.collectives}
    assert "roofline" in plan.describe(found)


@pytest.mark.tpu
def test_what_the_tpus_compiler_refuses_is_a_plan_that_does_not_fit():
    """A contrast of 2^18 rows on four chips: 64 GiB of similarities each, of 16."""
    c = toy_config(train__batch_size=2**18)
    batch = {
        name: jax.ShapeDtypeStruct((2**18, *x.shape[1:]), x.dtype) for name, x in TOY_BATCH.items()
    }
    found = plan.make_plan(c, ToyTask(), plan.parse_topology("v5e:2x2"), batch, build_model)
    assert not found.fits and found.memory_bytes > 64 * plan.GIB
    text = plan.describe(found)
    assert "too large for the compiler to finish" in text and "collectives  unknown" in text


@pytest.mark.tpu
def test_a_tpu_shape_that_does_not_exist_is_one_line():
    with pytest.raises(UserError, match="libtpu cannot describe it"):
        plan.devices_of(plan.parse_topology("v5e:3x77"))
