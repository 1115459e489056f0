import math

import pytest
import torch
from torch.autograd import gradcheck

from srppo.algo.loss import (
    clip_fraction,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
)
from srppo.algo.masking import masked_mean
from srppo.errors import ShapeError

MASK = torch.tensor([[True, True, True], [True, False, False]])


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        # The six cases of arXiv:1707.06347, figure 1, clip 0.2; slope = d loss / d log ratio.
        (0.5, 1.0, -0.5, -0.5),
        (1.0, 1.0, -1.0, -1.0),
        (1.5, 1.0, -1.2, 0.0),
        (0.5, -1.0, 0.8, 0.0),
        (1.0, -1.0, 1.0, 1.0),
        (1.5, -1.0, 1.5, 1.5),
    ],
)
def test_policy_loss_case_by_case(ratio, advantage, loss, slope):
    logprobs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    old, advantages = torch.zeros(1, 1), torch.full((1, 1), advantage)
    result = clipped_policy_loss(logprobs, old, advantages, 0.2)
    result.sum().backward()
    assert result.item() == pytest.approx(loss)
    assert logprobs.grad.item() == pytest.approx(slope)


def test_on_the_first_update_the_gradient_is_that_of_reinforce():
    logprobs, advantages = random(2, 4, 5)
    logprobs.requires_grad_()
    clipped_policy_loss(logprobs, logprobs.detach().clone(), advantages, 0.2).sum().backward()
    torch.testing.assert_close(logprobs.grad, -advantages)


def test_policy_loss_bounds_the_unclipped_one_from_above():
    logprobs, old, advantages = random(3, 50, 20)
    unclipped = -(logprobs - old).exp() * advantages
    assert (clipped_policy_loss(logprobs, old, advantages, 0.2) >= unclipped).all()
    wide = clipped_policy_loss(logprobs, old, advantages, 1e6)
    torch.testing.assert_close(wide, unclipped)


@pytest.mark.parametrize("mask", [None, MASK])
def test_gradients_by_finite_differences(mask):
    x, y, z = random(3, 2, 3)
    y = x + 0.3 * y  # some inside the clip range, some outside
    assert 0 < clip_fraction(x, y, MASK, 0.2) < 1
    x.requires_grad_()
    assert gradcheck(lambda x: clipped_policy_loss(x, y, z, 0.2, mask), x)
    assert gradcheck(lambda x: clipped_value_loss(x, y, z, 0.2, mask), x)
    limits = random(2, 3, seed=1).abs()
    assert gradcheck(lambda x: clipped_value_loss(x, y, z, limits, mask), x)


@pytest.mark.parametrize(
    ("value", "target", "loss", "slope"),
    [
        # The old value is 0, clip 0.2.
        (0.1, 1.0, 0.405, -0.9),  # inside the range: half the squared error
        (0.6, 1.0, 0.32, 0.0),  # ran ahead towards the target: counted as if still at 0.2
        (0.6, 0.1, 0.125, 0.5),  # ran past it: the real error
        (-0.6, 1.0, 1.28, -1.6),  # ran away from it: the real error
    ],
)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_value_loss_case_by_case(value, target, loss, slope, as_tensor):
    values = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    clip = torch.tensor(0.2, dtype=torch.float64) if as_tensor else 0.2
    result = clipped_value_loss(values, torch.zeros(1, 1), torch.tensor([[target]]), clip)
    result.sum().backward()
    assert result.item() == pytest.approx(loss, rel=1e-6)
    assert values.grad.item() == pytest.approx(slope, rel=1e-6)


def test_value_loss_without_clip_is_half_the_squared_error_and_never_more_than_with_it():
    values, old, returns = random(3, 50, 20)
    free = clipped_value_loss(values, old, returns, math.inf)
    mse = torch.nn.functional.mse_loss(values, returns, reduction="none")
    torch.testing.assert_close(free, mse / 2)
    assert (clipped_value_loss(values, old, returns, 0.2) >= mse / 2).all()


@pytest.mark.parametrize("loss", [clipped_policy_loss, clipped_value_loss])
def test_nan_in_padding_leaks_neither_forward_nor_backward(loss):
    x, y, z = random(3, 2, 3)
    y = x + 0.05 * y  # near enough that the ratio is not clipped
    results = []
    for padding in (0.0, math.nan):
        a, b, c = (t.masked_fill(~MASK, padding) for t in (x, y, z))
        a.requires_grad_()
        per_token = loss(a, b, c, 0.2, MASK)
        masked_mean(per_token, MASK).backward()
        results.append((per_token, a.grad))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)
        assert (dirty[~MASK] == 0).all()
        assert (dirty[MASK] != 0).all()


@pytest.mark.parametrize("loss", [clipped_policy_loss, clipped_value_loss])
def test_batch_of_one_equals_batch_of_many_and_the_mask_changes_no_response_token(loss):
    x, y, z = random(3, 2, 3)
    many = loss(x, y, z, 0.2)
    alone = [loss(x[i : i + 1], y[i : i + 1], z[i : i + 1], 0.2) for i in range(2)]
    assert torch.equal(many, torch.cat(alone))
    assert torch.equal(many[MASK], loss(x, y, z, 0.2, MASK)[MASK])


def test_clip_fraction_counts_both_sides_and_no_padding():
    ratio = torch.tensor([[0.7, 1.0, 1.3], [1.1, math.nan, 9.0]])
    zeros = torch.zeros(2, 3).masked_fill(~MASK, math.nan)
    assert clip_fraction(ratio.log(), zeros, MASK, 0.2).item() == 0.5
    assert clip_fraction(ratio.log(), zeros, MASK, 0.5).item() == 0


def test_explained_variance_is_the_squared_correlation_of_a_linear_fit():
    """R^2 = r^2 for least squares with intercept (textbook identity)."""
    x, noise = random(2, 4, 50)
    mask = torch.arange(50) < torch.tensor([50, 20, 1, 33])[:, None]
    y = 2 * x + noise
    stacked = torch.stack([x[mask], y[mask]])
    cov = torch.cov(stacked)
    fitted = cov[0, 1] / cov[0, 0] * x + 7  # a constant offset costs nothing
    fitted, y = fitted.masked_fill(~mask, math.nan), y.masked_fill(~mask, math.nan)
    r = torch.corrcoef(stacked)[0, 1]
    torch.testing.assert_close(explained_variance(fitted, y, mask), r**2)


def test_explained_variance_of_perfect_constant_and_opposite_critics():
    returns, everything = random(3, 4), torch.ones(3, 4, dtype=torch.bool)
    assert explained_variance(returns, returns, everything).item() == 1
    assert explained_variance(torch.ones(3, 4), returns, everything).item() == pytest.approx(0)
    assert explained_variance(-returns, returns, everything).item() == pytest.approx(-3)
    assert explained_variance(returns, torch.ones(3, 4), everything).isnan()


def test_different_shapes_are_refused():
    x = torch.zeros(2, 3)
    with pytest.raises(ShapeError, match=r"advantages \(2,\)"):
        clipped_policy_loss(x, x, x[:, 0], 0.2)
    with pytest.raises(ShapeError, match=r"returns \(2, 1\)"):
        clipped_value_loss(x, x, x[:, :1], 0.2)
    with pytest.raises(ShapeError, match=r"mask \(1, 3\)"):
        clipped_policy_loss(x, x, x, 0.2, MASK[:1])
    with pytest.raises(ShapeError, match=r"mask \(1, 3\)"):
        clipped_value_loss(x, x, x, 0.2, MASK[:1])
