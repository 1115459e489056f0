"""The critic: starts at a constant, in the units of the returns it will see."""

import math

import pytest
import torch

import tiny
from srppo.models.batching import make_batch
from srppo.models.value_head import ValueModel, values_of

ONE_BATCH = 10**6


@pytest.fixture
def critic():
    return ValueModel(tiny.model())


def trained(critic):
    """As after some updates: a head that is no longer zero."""
    torch.manual_seed(1)
    torch.nn.init.normal_(critic.head.weight)
    torch.nn.init.normal_(critic.head.bias)
    critic.calibrate(torch.tensor([1.0, 5.0]), torch.tensor([True, True]))
    return critic


def test_before_calibration_it_says_nan_rather_than_a_number(critic):
    assert not critic.calibrated
    assert values_of(critic, tiny.sequences(), ONE_BATCH)[0, 0].isnan()


def test_a_zero_head_gives_the_mean_return_everywhere(critic):
    y = tiny.sequences()
    critic.calibrate(torch.tensor([[3.0, 7.0, -99.0]]), torch.tensor([[True, True, False]]))
    assert critic.calibrated
    values = values_of(critic, y, ONE_BATCH)
    assert torch.equal(values, torch.where(y.mask, 5.0, 0.0))


def test_the_heads_unit_is_a_standard_deviation_of_the_returns(critic):
    y = tiny.sequences()
    critic.calibrate(torch.tensor([3.0, 7.0]), torch.tensor([True, True]))
    critic.head.bias.data.fill_(1.5)
    assert torch.equal(values_of(critic, y, ONE_BATCH), torch.where(y.mask, 5.0 + 1.5 * 2.0, 0.0))


def test_calibration_reads_response_tokens_only(critic):
    returns = torch.tensor([[3.0, 7.0, math.nan]])
    critic.calibrate(returns, returns.isfinite())
    assert float(critic.shift) == 5.0
    assert float(critic.scale) == 2.0  # the population's standard deviation


def test_calibration_on_equal_returns_keeps_the_scale_above_zero(critic):
    critic.calibrate(torch.full((1, 4), 2.0), torch.ones(1, 4, dtype=torch.bool))
    assert float(critic.scale) > 0


@pytest.mark.parametrize("architecture", list(tiny.ARCHITECTURES))
def test_padding_changes_no_value(architecture):
    critic = trained(ValueModel(tiny.model(architecture)))
    y = tiny.sequences()
    together = values_of(critic, y, ONE_BATCH)
    for i in range(len(y)):
        by_itself = make_batch(y, torch.tensor([i]), critic.device)
        with torch.no_grad():
            expected = critic(by_itself)[0]
        torch.testing.assert_close(together[i][y.mask[i]], expected, atol=1e-4, rtol=0)
    assert (together[~y.mask] == 0).all()
    assert together[y.mask].std() > 0.1


def test_a_value_depends_on_the_prefix_and_not_on_the_token_it_precedes(critic):
    critic = trained(critic)
    y = tiny.sequences(n=1, longest=6)
    before = values_of(critic, y, ONE_BATCH)
    last = int(y.lengths[0]) - 1
    y.response_ids[0, last] = (y.response_ids[0, last] + 1) % tiny.VOCAB
    assert torch.equal(values_of(critic, y, ONE_BATCH), before)
    y.prompt_ids[0][-1] = y.prompt_ids[0][-1] % (tiny.VOCAB - 1) + 1
    assert not torch.allclose(values_of(critic, y, ONE_BATCH), before)


def test_the_trunk_is_a_copy(critic):
    """Training the critic must not move the language model, nor the other way round."""
    model = tiny.model()
    critic = ValueModel(model)
    of_model = {p.data_ptr() for p in model.parameters()}
    assert not of_model & {p.data_ptr() for p in critic.parameters()}
    assert all(p.requires_grad for p in critic.parameters())


def test_shift_and_scale_are_saved_but_not_trained(critic):
    trained(critic)
    assert {"shift", "scale"} <= critic.state_dict().keys()
    assert {"shift", "scale"}.isdisjoint(name for name, _ in critic.named_parameters())
