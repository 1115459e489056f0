import math

import pytest
import torch

from srppo.algo.masking import (
    masked_mean,
    masked_sum,
    require_right_padded,
    require_same_shape,
    whiten,
)
from srppo.errors import ShapeError

NAN = math.nan
X = torch.tensor([[1.0, 2.0, NAN], [4.0, NAN, NAN]])
MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_sums_and_means_by_hand_with_nan_in_padding():
    assert masked_sum(X, MASK).item() == 7
    assert masked_sum(X, MASK, dim=1).tolist() == [3, 4]
    assert masked_mean(X, MASK).item() == pytest.approx(7 / 3)
    assert masked_mean(X, MASK, dim=1).tolist() == [1.5, 4]


def test_nan_in_padding_does_not_reach_the_gradient():
    x = X.clone().requires_grad_()
    masked_mean(x, MASK).backward()
    torch.testing.assert_close(x.grad, torch.tensor([[1.0, 1, 0], [1, 0, 0]]) / 3)
    x.grad = None
    whiten(x, MASK)[0, 0].backward()
    assert x.grad.isfinite().all()
    assert (x.grad[~MASK] == 0).all()


def test_nan_at_a_response_token_is_not_hidden():
    everything = torch.ones_like(MASK)
    assert masked_sum(X, everything).isnan()
    assert whiten(X, everything).isnan().all()
    spoilt = whiten(torch.tensor([[1.0, NAN, 2.0]]), torch.tensor([[True, True, False]]))
    assert spoilt.isnan().tolist() == [[True, True, False]]


def test_mean_of_nothing_is_nan_and_of_one_row_does_not_spoil_the_others():
    mask = torch.tensor([[False, False, False], [True, False, False]])
    means = masked_mean(X, mask, dim=1)
    assert means[0].isnan()
    assert means[1] == 4


@pytest.mark.parametrize(("shift", "scale"), [(0, 1), (10, 1), (-3, 1e-3), (1e3, 50)])
def test_whiten_gives_mean_0_variance_1_whatever_the_input(shift, scale):
    x = torch.randn(7, 9, dtype=torch.float64) * scale + shift
    mask = torch.arange(9) < torch.randint(1, 10, (7, 1))
    white = whiten(x.masked_fill(~mask, NAN), mask)
    assert white[mask].mean().abs() < 1e-9
    assert white[mask].var(unbiased=False).item() == pytest.approx(1)
    assert (white[~mask] == 0).all()
    assert torch.equal(white[mask].argsort(), x[mask].argsort())


def test_whiten_of_rewards_without_spread_is_zero_not_amplified_rounding():
    x = torch.full((3, 1000), 0.1)
    assert (whiten(x, torch.ones(3, 1000, dtype=torch.bool)) == 0).all()
    assert (whiten(torch.tensor([[5.0, NAN]]), torch.tensor([[True, False]])) == 0).all()


def test_whiten_sees_the_whole_batch_not_each_row():
    x, mask = torch.tensor([[1.0], [3.0]]), torch.ones(2, 1, dtype=torch.bool)
    assert whiten(x, mask).flatten().tolist() == pytest.approx([-1, 1])


def test_different_shapes_are_named():
    with pytest.raises(ShapeError, match=r"sft \(2, 3\), mask \(2,\)"):
        require_same_shape(sft=X, mask=MASK[:, 0])
    with pytest.raises(ShapeError, match=r"x \(2, 3\), mask \(1, 3\)"):
        masked_sum(X, MASK[:1])
    require_same_shape(x=X, mask=MASK)


def test_left_padding_and_holes_are_refused():
    for bad in ([False, True, True], [True, False, True]):
        with pytest.raises(ShapeError, match="mask row 1"):
            require_right_padded(torch.tensor([[True, True, False], bad]))
    require_right_padded(MASK)
    require_right_padded(torch.zeros(2, 3, dtype=torch.bool))
