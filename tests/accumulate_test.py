"""Gradient accumulation: averages are over the global batch, not over micro-batches."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy_run import RealLoader, RealTask, toy_config

from stoa_jax import averages, config, sharding
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.parameters import named_parameters
from stoa_jax.models.stoa import Stoa
from stoa_jax.program import make_program


def setup(parts, **losses):
    c = toy_config(train__accumulate=parts, train__batch_size=16)
    config.set_losses(c, **losses)
    task = RealTask(c)
    return c, task, make_program(c, task, 10, devices=jax.devices()[:1])


def uneven_batch(c):
    """Return a batch whose odd rows, the second micro-batch of two, have few valid entries."""
    batch = next(iter(RealLoader(c, 0)))
    batch["valid"][5::2] = False
    batch["tags"][1::2] = 0
    batch["classes"][1::2, :, 1:] = -1
    return batch


def step(program, batch):
    with jax.set_mesh(program.mesh):
        rows = sharding.to_devices(batch, program.mesh, len(batch["valid"]))
        state, values = program.step(program.init(), rows)
    assert int(state.skipped) == 0
    return dict(zip(program.metrics, np.asarray(values).tolist(), strict=True))


@pytest.mark.slow
def test_alignment_losses_do_not_depend_on_the_number_of_micro_batches():
    losses = dict(ota=1.0, asp=0.5)
    c, _, whole = setup(1, **losses)
    batch = uneven_batch(c)
    metrics, micro_metrics = step(whole, batch), step(setup(2, **losses)[2], batch)
    assert {"loss_ota", "loss_asp", "ota_none", "grad_norm/regions"} <= set(metrics)
    for name, value in metrics.items():
        assert micro_metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-7), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlm", "plm"])
def test_language_losses_weigh_every_word_the_same(name):
    """Each micro-batch has its own random keys, so the expectation is computed by hand."""
    c, task, program = setup(2, **{name: 1.0})
    batch = uneven_batch(c)
    metrics = step(program, batch)
    model = program.model_with(program.init().params)
    key = jax.random.fold_in(jax.random.key(c.seed), 0)
    total = count = 0.0
    means = []
    for i in range(2):
        rows = {k: jnp.asarray(x[i::2]) for k, x in batch.items()}
        with averages.recording() as counts:
            loss, _ = task.loss(model, rows, jax.random.fold_in(key, i))
        total, count = total + float(loss * counts[0]), count + float(counts[0])
        means.append(float(loss))
    assert metrics["loss"] == pytest.approx(total / count, rel=1e-5)
    assert metrics["loss"] != pytest.approx(np.mean(means), rel=1e-4)


def test_the_mean_of_a_micro_batch_divides_by_the_mean_count():
    x, mask = jnp.array([1.0, 2.0, 3.0, jnp.nan]), jnp.array([True, True, False, False])
    assert averages.mean(x, mask) == 1.5
    assert averages.mean(x, jnp.array([3.0, 1.0, 0.0, 0.0])) == 1.25
    assert averages.mean(x, jnp.zeros(4, bool)) == 0.0
    with averages.recording() as counts:
        averages.mean(x, mask)
    assert [float(n) for n in counts] == [2.0]
    with averages.over([jnp.float32(6.0)], 2):
        assert averages.mean(x, mask) == 1.0
    with (
        pytest.raises(RuntimeError, match="fewer averages"),
        averages.over([jnp.float32(6.0)] * 2, 2),
    ):
        averages.mean(x, mask)


def test_positions_and_slots_are_not_decayed():
    c = config.default()
    model = dataclasses.replace(ModelConfig.tiny().released(), scan_layers=False)
    names = named_parameters(jax.eval_shape(lambda: Stoa(model, rngs=nnx.Rngs(0))))
    kept = {name for name in names if re.search(c.optim.no_decay, name)}
    assert {"regions/slot_embedding", "regions/frame_embedding", "text/positions"} <= kept
    assert "text/token_embedding" not in kept and "visual/proj" not in kept
