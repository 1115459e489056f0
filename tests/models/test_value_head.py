"""The critic: starts at a constant, in the units of the returns it will see."""

import math

import pytest
import torch

import tiny
from srppo.models.value_head import ValueHead

HIDDEN = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def critic():
    return ValueHead(tiny.model())


def test_before_calibration_it_says_nan_rather_than_a_number(critic):
    assert not critic.calibrated
    assert critic(HIDDEN).isnan().all()


def test_zero_weights_give_the_mean_return_everywhere(critic):
    critic.calibrate(torch.tensor([[3.0, 7.0, -99.0]]), torch.tensor([[True, True, False]]))
    assert critic.calibrated
    assert torch.equal(critic(HIDDEN), torch.full((5,), 5.0))


def test_its_unit_is_a_standard_deviation_of_the_returns(critic):
    critic.calibrate(torch.tensor([3.0, 7.0]), torch.tensor([True, True]))
    critic.out.bias.data.fill_(1.5)
    assert torch.equal(critic.units(HIDDEN), torch.full((5,), 1.5))
    assert torch.equal(critic(HIDDEN), torch.full((5,), 5.0 + 1.5 * 2.0))


def test_calibration_reads_response_tokens_only(critic):
    returns = torch.tensor([[3.0, 7.0, math.nan]])
    critic.calibrate(returns, returns.isfinite())
    assert float(critic.shift) == 5.0
    assert float(critic.scale) == 2.0  # the population's standard deviation


def test_calibration_on_equal_returns_keeps_the_scale_above_zero(critic):
    critic.calibrate(torch.full((1, 4), 2.0), torch.ones(1, 4, dtype=torch.bool))
    assert float(critic.scale) > 0


def test_calibration_waits_for_returns_that_are_numbers(critic):
    critic.calibrate(torch.tensor([1.0, -math.inf]), torch.tensor([True, True]))
    assert not critic.calibrated
    critic.calibrate(torch.tensor([3.0, 7.0]), torch.tensor([True, True]))
    assert float(critic.shift) == 5.0


def test_no_gradient_reaches_the_policy(critic):
    critic.calibrate(torch.tensor([3.0, 7.0]), torch.tensor([True, True]))
    hidden = HIDDEN.clone().requires_grad_()
    critic(hidden).sum().backward()
    assert hidden.grad is None
    assert critic.out.weight.grad.abs().sum() > 0


def test_values_are_float32_whatever_the_policy_computes_in(critic):
    assert critic.units(HIDDEN.bfloat16()).dtype == torch.float32


def test_equal_runs_have_equal_critics(critic):
    torch.manual_seed(7)
    other = ValueHead(tiny.model())
    assert all(
        torch.equal(a, b) for a, b in zip(critic.parameters(), other.parameters(), strict=True)
    )


def test_shift_and_scale_are_saved_but_not_trained(critic):
    assert {"shift", "scale"} <= critic.state_dict().keys()
    assert {"shift", "scale"}.isdisjoint(name for name, _ in critic.named_parameters())


def test_autocast_does_not_round_values_of_hundreds_of_nats(critic):
    critic.calibrate(torch.tensor([497.3, 503.3]), torch.tensor([True, True]))
    with torch.autocast("cpu", torch.bfloat16):
        values = critic(HIDDEN)
    assert torch.equal(values, torch.full((5,), 500.3))
