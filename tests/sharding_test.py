"""The mesh, the rules, and results that do not depend on either."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from toy_run import RealLoader, RealTask, ToyLoader, ToyTask, build_model, toy_config

from stoa_jax import checkpoint, config, sharding
from stoa_jax.errors import UserError
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.parameters import named_parameters
from stoa_jax.models.stoa import Stoa
from stoa_jax.program import make_program


def shapes(config):
    return named_parameters(jax.eval_shape(lambda: Stoa(config, rngs=nnx.Rngs(0))))


def mesh(**sizes):
    c = toy_config(**{f"mesh__{axis}": size for axis, size in sizes.items()})
    return sharding.make_mesh(c)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (dict(data=-1), (8, 1, 1)),
        (dict(data=2, fsdp=-1), (2, 4, 1)),
        (dict(data=1, fsdp=4, tensor=2), (1, 4, 2)),
    ],
)
def test_mesh_takes_what_is_left(sizes, expected):
    assert tuple(mesh(**sizes).shape.values()) == expected


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        (dict(data=3), "data=3.*needs 3 device.*there are 8"),
        (dict(data=-1, fsdp=3), "does not divide 8"),
        (dict(data=-1, fsdp=-1), "one of them may be -1"),
        (dict(data=0), "1 or more"),
    ],
)
def test_a_mesh_that_does_not_fit_is_one_line(sizes, says):
    with pytest.raises(UserError, match=says):
        mesh(**sizes)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(train__batch_size=12), r"train\.batch_size: 12 is not divisible by 8 .*use 8"),
        (dict(eval__batch_size=20), r"eval\.batch_size: 20 .*use 16"),
        (dict(train__accumulate=3), r"8 device\(s\) times train\.accumulate 3; use 24"),
    ],
)
def test_a_batch_that_does_not_divide_is_one_line(settings, says):
    c = toy_config(**settings)
    with pytest.raises(UserError, match=says):
        sharding.check_batch(c, sharding.make_mesh(c))


def test_base_is_pure_data_parallel():
    specs = sharding.param_specs(shapes(ModelConfig.base()), mesh())
    assert set(specs.values()) == {P()}


def test_large_is_split_over_fsdp_but_never_along_the_depth():
    model = shapes(ModelConfig.large14())
    specs = sharding.param_specs(model, mesh(data=1, fsdp=8))
    assert specs.keys() == model.keys()
    kept = 0
    for name, shape in model.items():
        spec = specs[name]
        for dim, axis in enumerate(spec):
            if axis is not None:
                assert axis == "fsdp" and shape.shape[dim] % 8 == 0
                assert not ("blocks/" in name and dim == 0), name
        if "fsdp" not in spec:
            kept += shape.size
    whole = sum(shape.size for shape in model.values())
    assert kept < 0.01 * whole


def test_tensor_splits_heads_and_the_inner_width():
    specs = sharding.param_specs(shapes(ModelConfig.base()), mesh(data=2, fsdp=2, tensor=2))
    assert specs["visual/blocks/attention/qkv/kernel"] == P(None, "fsdp", None, "tensor")
    assert specs["visual/blocks/attention/out/kernel"] == P(None, "tensor", None, "fsdp")
    assert specs["visual/blocks/mlp/up/kernel"] == P(None, "fsdp", "tensor")
    assert specs["visual/blocks/mlp/down/kernel"] == P(None, "tensor", "fsdp")


def test_heads_that_do_not_divide_are_one_line():
    odd = dataclasses.replace(ModelConfig.tiny(), vision_width=96, vision_heads=3)
    with pytest.raises(
        UserError, match=r"mesh\.tensor: 2 does not divide dimension 1 of .*; use a divisor of 3"
    ):
        sharding.param_specs(shapes(odd), mesh(data=4, tensor=2))


def test_the_optimizer_follows_its_parameter(monkeypatch):
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 1)
    c = toy_config(mesh__data=1, mesh__fsdp=8)
    program = make_program(c, ToyTask(), 10, build_model)
    state = program.init()
    moments = [s for s in jax.tree.leaves(state.opt_state) if s.shape == (8, 16)]
    assert len(moments) == 2
    for x in (state.params["visual/kernel"], *moments):
        assert {shard.data.shape for shard in x.addressable_shards} == {(8, 2)}


@functools.cache
def on_one_device():
    return ten_steps(toy_config(), jax.devices()[:1])


def ten_steps(c, devices, steps=10):
    program = make_program(c, ToyTask(), steps, build_model, devices)
    loader = iter(ToyLoader(c, 0))
    with jax.set_mesh(program.mesh):
        state, seen = program.init(), []
        for _ in range(steps):
            batch = sharding.to_devices(next(loader), program.mesh, c.train.batch_size)
            state, figures = program.step(state, batch)
            seen.append(np.asarray(figures))
    return jax.device_get(state.params), np.array(seen)


@pytest.mark.parametrize(
    ("count", "sizes"),
    [
        (2, {}),
        (4, {}),
        (8, {}),
        (8, dict(data=2, fsdp=4)),
        (8, dict(data=2, fsdp=2, tensor=2)),
    ],
)
def test_ten_steps_agree_on_any_number_of_devices(count, sizes, monkeypatch):
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 1)
    c = toy_config(**{f"mesh__{axis}": size for axis, size in sizes.items()})
    params, seen = ten_steps(c, jax.devices()[:count])
    one, seen_one = on_one_device()
    np.testing.assert_allclose(seen, seen_one, rtol=1e-5, atol=1e-5)
    for name in one:
        np.testing.assert_allclose(params[name], one[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_accumulation_is_the_mean_over_micro_batches_on_any_devices():
    c = toy_config(train__accumulate=2, train__batch_size=16)
    params, _ = ten_steps(c, jax.devices()[:8])
    one, _ = ten_steps(c, jax.devices()[:1])
    whole, _ = on_one_device()
    for name in one:
        np.testing.assert_allclose(params[name], one[name], rtol=1e-5, atol=1e-5, err_msg=name)
    # The contrast is within a micro-batch, so the numbers differ from the whole batch's.
    assert np.abs(one["visual/kernel"] - whole["visual/kernel"]).max() > 1e-4


def real_steps(count, sizes, steps=10):
    """Return the real model's first gradients, all metrics, and the last parameters."""
    c = toy_config(**{f"mesh__{axis}": size for axis, size in sizes.items()})
    c.optim.groups = config.default().optim.groups  # the recipe's
    program = make_program(c, RealTask(c), steps, devices=jax.devices()[:count])
    loader = iter(RealLoader(c, 0))
    with jax.set_mesh(program.mesh):
        state, seen = program.init(), []
        for step in range(steps):
            batch = sharding.to_devices(next(loader), program.mesh, c.train.batch_size)
            state, figures = program.step(state, batch)
            seen.append(np.asarray(figures))
            if step == 0:  # Adam's first moment is the gradient, clipped, times 1 - beta
                moments = checkpoint.flatten(state.opt_state)
                gradients = {k: np.asarray(v) / 0.1 for k, v in moments.items() if "/mu/" in k}
    assert len(gradients) == len(state.params)
    return gradients, np.array(seen), jax.device_get(state.params)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "sizes"), [(2, {}), (4, {}), (8, {}), (8, dict(data=2, fsdp=2, tensor=2))]
)
def test_the_real_model_agrees_on_any_number_of_devices(count, sizes, monkeypatch):
    """Loss, gradients and ten steps in float32, with all six losses and their random choices."""
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 64)
    one = real_steps_on_one()
    found = real_steps(count, sizes)
    np.testing.assert_allclose(found[1], one[1], rtol=1e-5, atol=1e-5)
    for ours, expected in ((found[0], one[0]), (found[2], one[2])):
        for name in expected:
            np.testing.assert_allclose(
                ours[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=name
            )


@functools.cache
def real_steps_on_one():
    return real_steps(1, {})
