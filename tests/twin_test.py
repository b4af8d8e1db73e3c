"""The PyTorch twin of the benchmarks: its losses and gradients are ours."""

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
