import math

import numpy as np
import pytest
import torch

from srppo.algo.kl import k1, k2, k3
from srppo.errors import ShapeError


@pytest.fixture(params=range(5))
def distributions(request):
    """Log-probabilities of policy and ref over 6 outcomes, near each other and far apart."""
    generator = torch.Generator().manual_seed(request.param)
    logits = torch.randn(2, 6, dtype=torch.float64, generator=generator) * (0.01 + request.param)
    return logits.log_softmax(-1)


def exact_kl(policy, ref):
    """Cross-entropy minus entropy, outcome by outcome."""
    return sum(
        math.exp(p) * p - math.exp(p) * q
        for p, q in zip(policy.tolist(), ref.tolist(), strict=True)
    )


@pytest.mark.parametrize("estimator", [k1, k3])
def test_k1_and_k3_are_unbiased(estimator, distributions):
    policy, ref = distributions
    expectation = (policy.exp() * estimator(policy, ref)).sum()
    assert expectation.item() == pytest.approx(exact_kl(policy, ref), abs=1e-12)


def test_k2_has_the_known_bias(distributions):
    """E[k2] = (Var[k1] + KL^2) / 2."""
    policy, ref = distributions
    kl, p = exact_kl(policy, ref), policy.exp()
    variance = (p * (policy - ref - kl).square()).sum().item()
    assert (p * k2(policy, ref)).sum().item() == pytest.approx((variance + kl**2) / 2)


@pytest.mark.parametrize("m", [0.1, 1.0, 2.0])
def test_gaussians_of_unit_variance_in_closed_form(m):
    """KL(N(0,1) || N(m,1)) = m^2/2; k2 is off by m^4/8; Var[k1] = m^2. By quadrature."""
    x, weight = np.polynomial.hermite_e.hermegauss(80)
    weight = torch.from_numpy(weight / math.sqrt(2 * math.pi))
    x = torch.from_numpy(x)
    policy, ref = -0.5 * x**2, -0.5 * (x - m) ** 2
    mean = {k.__name__: (weight * k(policy, ref)).sum().item() for k in (k1, k2, k3)}
    assert mean["k1"] == pytest.approx(m**2 / 2)
    assert mean["k2"] == pytest.approx(m**2 / 2 + m**4 / 8)
    assert mean["k3"] == pytest.approx(m**2 / 2)
    second_moment = (weight * k1(policy, ref) ** 2).sum().item()
    assert second_moment - mean["k1"] ** 2 == pytest.approx(m**2)


def test_k2_and_k3_are_never_negative_even_in_float32():
    log_ratio = torch.cat([torch.linspace(-20, 20, 10001), torch.logspace(-12, 0, 1000)])
    for estimator in (k2, k3):
        estimate = estimator(log_ratio, torch.zeros_like(log_ratio))
        assert (estimate >= 0).all()
        assert (estimate[log_ratio == 0] == 0).all()


def test_k3_of_nearly_equal_models_keeps_its_leading_term():
    """k3 ~ d^2/2 for a small log-ratio d; exp(-d) - 1 + d would round to zero."""
    d = torch.tensor([1e-3], dtype=torch.float32)
    assert k3(d, torch.zeros(1)).item() == pytest.approx(0.5e-6, rel=0.05)


def test_different_shapes_are_refused():
    with pytest.raises(ShapeError, match="ref_logprobs"):
        k1(torch.zeros(2, 3), torch.zeros(2, 1))
