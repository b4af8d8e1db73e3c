"""Parameter groups, freezing, weight decay, schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_run import toy_config

from stoa_jax import optim
from stoa_jax.errors import UserError

PARAMS = {
    "fusion/mlp/kernel": jnp.ones((4, 4)),
    "fusion/mlp/bias": jnp.ones(4),
    "trajectory/cls": jnp.ones(4),
    "visual/kernel": jnp.ones((4, 4)),
}


def config(groups, **settings):
    c = toy_config(**settings)
    c.optim.groups = groups
    return c


def test_the_first_group_that_fits_wins_and_idle_ones_are_reported():
    rates, unused = optim.learning_rates(
        config(((r"^visual", 1e-6), (r"kernel$", 1e-5), (r"^nothing", 1.0), (r".*", 1e-4))), PARAMS
    )
    assert rates == {
        "fusion/mlp/kernel": 1e-5,
        "fusion/mlp/bias": 1e-4,
        "trajectory/cls": 1e-4,
        "visual/kernel": 1e-6,
    }
    assert unused == ["^nothing"]


def test_a_parameter_without_a_group_is_named():
    with pytest.raises(UserError, match=r"optim\.groups.*'fusion/mlp/"):
        optim.learning_rates(config(((r"^visual", 1e-6),)), PARAMS)


@pytest.mark.parametrize("rate", [-1.0, float("nan"), "fast"])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(UserError, match="learning rate of"):
        optim.learning_rates(config(((r".*", rate),)), PARAMS)


def test_frozen_parameters_have_no_moments():
    c = config(((r"^visual", 0), (r".*", 1e-3)))
    rates, _ = optim.learning_rates(c, PARAMS)
    free = optim.trainable(PARAMS, rates)
    assert set(free) == set(PARAMS) - {"visual/kernel"}
    state = optim.make_optimizer(c, rates, 10).init(free)
    paths = [str(path) for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
    assert any("fusion/mlp/kernel" in path for path in paths)
    assert not any("visual/kernel" in path for path in paths)


def test_equals_adamw_with_one_rate_and_everything_decayed():
    c = config(((r".*", 1e-2),), optim__no_decay="nothing", optim__clip_norm=0.5)
    rates, _ = optim.learning_rates(c, PARAMS)
    ours = optim.make_optimizer(c, rates, 20)
    theirs = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(
            lambda count: 1e-2 * optim.schedule(c, 20)(count), b1=0.9, b2=0.98, weight_decay=0.2
        ),
    )
    a, b = PARAMS, PARAMS
    state_a, state_b = ours.init(a), theirs.init(b)
    for i in range(5):
        grads = jax.tree.map(lambda x, i=i: jax.random.normal(jax.random.key(i), x.shape), PARAMS)
        updates, state_a = ours.update(grads, state_a, a)
        a = optax.apply_updates(a, updates)
        updates, state_b = theirs.update(grads, state_b, b)
        b = optax.apply_updates(b, updates)
    for name in PARAMS:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-6, err_msg=name)


def test_decay_leaves_biases_alone():
    c = config(((r".*", 1e-2),), optim__schedule="constant", optim__warmup=0.0)
    rates, _ = optim.learning_rates(c, PARAMS)
    optimizer = optim.make_optimizer(c, rates, 10)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = optimizer.update(zero, optimizer.init(PARAMS), PARAMS)
    for name, update in updates.items():
        expected = -1e-2 * 0.2 if not name.endswith("bias") else 0.0
        np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg=name)


def test_schedule_rises_to_the_peak_and_falls_to_nothing():
    share = optim.schedule(config(((r".*", 1.0),)), 100)
    values = [float(share(jnp.array(i))) for i in range(101)]
    assert values[0] == pytest.approx(0.1)
    assert values[9] == pytest.approx(1.0)
    assert values[55] == pytest.approx(0.5, abs=1e-6)
    assert values[100] == pytest.approx(0.0, abs=1e-6)
    assert values[:10] == sorted(values[:10])
    assert values[10:] == sorted(values[10:], reverse=True)


def test_an_unknown_schedule_is_named():
    with pytest.raises(UserError, match="'linear' is not known"):
        optim.schedule(config(((r".*", 1.0),), optim__schedule="linear"), 10)


def test_norms_by_module_add_up():
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), PARAMS)
    norms = optim.norms_by_module(grads)
    assert set(norms) == {"fusion", "trajectory", "visual"}
    whole = sum(float(norm) ** 2 for norm in norms.values()) ** 0.5
    assert whole == pytest.approx(float(optax.tree.norm(grads)), rel=1e-6)
