"""Losses of pairs as density-ratio estimates, and as others compute them; weights by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from srppo.algo.imitation import importance_weights, pair_losses
from srppo.errors import ConfigError, ShapeError

GSIL = ["logistic", "brier", "hinge", "kliep", "lsif"]


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- importance weights ---------------------------------------------------------------------------

MASK = torch.tensor([[True, True, True], [True, True, False]])
RATIOS = torch.tensor([[2.0, 0.5, 8.0], [0.1, 1.1, 1.0]]).double()


def test_a_tokens_weight_is_its_probability_ratio_within_bounds():
    weights = importance_weights(RATIOS.log(), torch.zeros(2, 3).double(), MASK, "token")
    expected = [[1.8, 0.5, 1.8], [0.2, 1.1, 1.0]]
    torch.testing.assert_close(weights, torch.tensor(expected).double())


def test_a_responses_weight_is_the_geometric_mean_of_its_tokens_ratios():
    weights = importance_weights(RATIOS.log(), torch.zeros(2, 3).double(), MASK, "response")
    one, two = (2 * 0.5 * 8) ** (1 / 3), (0.1 * 1.1) ** (1 / 2)
    expected = torch.tensor([[one, one, one], [two, two, 1.0]]).double()
    torch.testing.assert_close(weights, expected)


def test_a_responses_weight_has_an_upper_bound():
    logprobs = torch.full((1, 4), 3.0)  # e^3 > 16
    mask = torch.ones(1, 4, dtype=torch.bool)
    weights = importance_weights(logprobs, torch.zeros(1, 4), mask, "response")
    assert weights.tolist() == [[16.0] * 4]


@pytest.mark.parametrize("of", ["response", "token"])
def test_weights_are_one_at_the_start_have_no_gradient_and_do_not_read_padding(of):
    logprobs = random(2, 3).requires_grad_()
    reference = logprobs.detach().clone()
    reference[1, 2] = math.nan
    weights = importance_weights(logprobs, reference, MASK, of)
    assert weights.tolist() == [[1.0] * 3] * 2
    assert not weights.requires_grad


# --- losses of pairs ------------------------------------------------------------------------------


def test_spin_and_gsil_as_torchs_own_losses_have_them():
    data, own, scale, shift = random(9), random(9, seed=1), 0.7, 0.3
    real, fake = scale * data + shift, scale * own + shift
    one, zero = torch.ones(9).double(), torch.zeros(9).double()
    expected = {
        "spin": F.soft_margin_loss(real - fake, one, reduction="none"),
        "logistic": F.binary_cross_entropy_with_logits(real, one, reduction="none")
        + F.binary_cross_entropy_with_logits(fake, zero, reduction="none"),
        "brier": F.mse_loss(torch.sigmoid(real), one, reduction="none")
        + F.mse_loss(torch.sigmoid(fake), zero, reduction="none"),
        "hinge": F.multi_margin_loss(torch.stack([real, zero], 1), one.long() * 0, reduction="none")
        * 2
        + F.multi_margin_loss(torch.stack([fake, zero], 1), one.long(), reduction="none") * 2,
        "kliep": F.poisson_nll_loss(fake, zero, log_input=True, reduction="none") - real,
        "lsif": torch.special.expm1(2 * fake) / 2 + 0.5 - torch.special.expm1(real) - 1,
    }
    for loss, values in expected.items():
        torch.testing.assert_close(pair_losses(data, own, loss, scale, shift), values)


@pytest.mark.parametrize("loss", ["logistic", "brier", "kliep", "lsif"])
def test_the_least_expected_loss_is_at_the_log_density_ratio(loss):
    """What defines these losses: of all functions f of five responses, log p/q has the least."""
    p, q = (random(5, seed=s).softmax(0) for s in (2, 3))

    def expected(f):
        nothing = torch.zeros_like(f)
        return pair_losses(f, nothing, loss, 1.0) @ p + pair_losses(nothing, f, loss, 1.0) @ q

    best = (p / q).log().requires_grad_()
    (slope,) = torch.autograd.grad(expected(best), best)
    torch.testing.assert_close(slope, torch.zeros(5).double(), atol=1e-12, rtol=0)
    best = best.detach()
    others = best + torch.cat([scale * random(500, 5) for scale in (0.01, 0.3, 3.0)])
    assert min(float(expected(f)) for f in others) > float(expected(best))


@pytest.mark.parametrize("loss", ["spin", *GSIL])
def test_every_loss_raises_demonstrations_and_lowers_own_responses(loss):
    data = torch.tensor([-0.5, 0.0, 0.5], dtype=torch.float64, requires_grad=True)
    own = torch.tensor([0.5, 0.0, -0.5], dtype=torch.float64, requires_grad=True)
    pair_losses(data, own, loss, 1.0).sum().backward()
    assert (data.grad < 0).all()
    assert (own.grad > 0).all()


def test_the_shift_cancels_in_spin_alone():
    data, own = random(4), random(4, seed=1)
    for loss in ("spin", *GSIL):
        same = torch.allclose(
            pair_losses(data, own, loss, 0.5), pair_losses(data, own, loss, 0.5, 0.4)
        )
        assert same == (loss == "spin")


def test_what_is_refused():
    with pytest.raises(ConfigError, match="loss='dpo' is unknown"):
        pair_losses(torch.zeros(2), torch.zeros(2), "dpo", 1.0)
    with pytest.raises(ShapeError):
        pair_losses(torch.zeros(2), torch.zeros(3), "spin", 1.0)
    with pytest.raises(ShapeError):
        importance_weights(torch.zeros(1, 2), torch.zeros(1, 3), torch.ones(1, 2).bool(), "token")
