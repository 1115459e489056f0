"""Truncated importance weights against sums over a whole distribution."""

import math

import pytest
import torch
from torch import Tensor

from srppo.algo.mismatch import importance_weights
from srppo.errors import ShapeError

V = 7


def pair(spread: float) -> tuple[Tensor, Tensor]:
    """log p of a trainer and log q of a sampler, (V,) float64."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, V, generator=generator, dtype=torch.float64)
    p = logits[0].log_softmax(0)
    return p, (logits[0] + spread * logits[1]).log_softmax(0)


def mean_under_the_sampler(p: Tensor, q: Tensor, f: Tensor, cap: float) -> Tensor:
    """E_{a ~ q}[w(a) f(a)] over all a, each a response of one token."""
    mask = torch.ones(V, 1, dtype=torch.bool)
    weights = importance_weights(p[:, None], q[:, None], mask, cap).squeeze(1)
    return (q.exp() * weights * f).sum()


F = torch.linspace(-2, 5, V, dtype=torch.float64)


def test_below_the_cap_the_expectation_is_the_trainers():
    p, q = pair(spread=0.3)
    assert float((p - q).exp().max()) < 3
    torch.testing.assert_close(mean_under_the_sampler(p, q, F, 3.0), (p.exp() * F).sum())
    assert (q.exp() * F).sum() != pytest.approx(float((p.exp() * F).sum()), abs=1e-2)


def test_beyond_it_what_is_missing_is_what_the_docstring_says():
    p, q = pair(spread=2.0)
    cap = 1.5
    over = p > q + math.log(cap)
    assert 0 < over.sum() < V
    missing = ((p.exp() - cap * q.exp()) * F)[over].sum()
    found = mean_under_the_sampler(p, q, F, cap)
    torch.testing.assert_close(found, (p.exp() * F).sum() - missing)


def test_no_weight_exceeds_the_cap_and_rounding_leaves_it_near_one():
    logprobs = torch.tensor([[-1.0, -2.0, -3.0]])
    sampled = torch.tensor([[-1.0, -4.0, -2.99]])
    mask = torch.tensor([[True, True, True]])
    expected = torch.tensor([[1.0, 2.0, math.exp(-0.01)]])
    torch.testing.assert_close(importance_weights(logprobs, sampled, mask, 2.0), expected)


def test_padding_has_weight_one_and_nothing_has_a_gradient():
    logprobs = torch.tensor([[-1.0, math.nan]], requires_grad=True)
    sampled = torch.tensor([[-2.0, math.inf]])
    weights = importance_weights(logprobs, sampled, torch.tensor([[True, False]]), 10.0)
    torch.testing.assert_close(weights, torch.tensor([[math.e, 1.0]]))
    assert not weights.requires_grad


def test_shapes_have_to_agree():
    with pytest.raises(ShapeError):
        importance_weights(torch.zeros(1, 2), torch.zeros(1, 3), torch.ones(1, 2).bool(), 2.0)
