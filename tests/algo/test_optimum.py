import math

import pytest
import torch

from srppo.algo import logprobs as module
from srppo.algo.logprobs import token_logprobs
from srppo.algo.optimum import (
    enumerate_responses,
    extrapolate,
    extrapolated_nll,
    objective,
    optimum,
)
from srppo.algo.reward import Bounds, token_log_ratios, token_rewards
from srppo.errors import ConfigError, ShapeError

V, EOS, T = 3, 1, 4


def random(*shape, seed=0):
    return 2 * torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def table_logprobs(seed, ids, mask):
    """(S, T) log-probabilities under a model with its own random row for every prefix."""
    rows, out = {}, torch.zeros(ids.shape, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for s, y in enumerate(ids.tolist()):
        for t in range(int(mask[s].sum())):
            prefix = tuple(y[:t])
            if prefix not in rows:
                logits = torch.randn(V, dtype=torch.float64, generator=generator)
                rows[prefix] = logits.log_softmax(0)
            out[s, t] = rows[prefix][y[t]]
    return out


@pytest.fixture(scope="module")
def world():
    ids, mask = enumerate_responses(V, EOS, T)
    return (*(table_logprobs(seed, ids, mask) for seed in (1, 2, 3)), mask)


def test_enumeration_by_hand():
    ids, mask = enumerate_responses(2, 0, 2)
    responses = {tuple(y[m].tolist()) for y, m in zip(ids, mask, strict=True)}
    assert responses == {(0,), (1, 0), (1, 1)}
    assert (ids[~mask] == 0).all()


@pytest.mark.parametrize(("vocab_size", "max_length"), [(2, 1), (3, 4), (5, 3)])
def test_enumeration_counts_and_repeats_nothing(vocab_size, max_length):
    ids, mask = enumerate_responses(vocab_size, 1, max_length)
    others = vocab_size - 1
    assert len(ids) == sum(others**n for n in range(max_length)) + others**max_length
    assert len({tuple(y[m].tolist()) for y, m in zip(ids, mask, strict=True)}) == len(ids)
    ended = (ids == 1) & mask
    assert (ended.sum(1) <= 1).all()
    assert (mask.sum(1)[~ended.any(1)] == max_length).all()


def test_probabilities_of_all_responses_sum_to_one_for_any_model(world):
    for logprobs in world[:3]:
        assert logprobs.sum(1).exp().sum().item() == pytest.approx(1)


def test_the_token_rewards_expected_under_the_policy_are_the_objective(world):
    sft, base, policy, mask = world
    for credit in ("eos", "token"):
        for name, ref in (("sft", sft), ("base", base)):
            log_ratios = token_log_ratios(sft, base, mask)
            returns = token_rewards(log_ratios, policy, ref, mask, 0.3, credit).sum(1)
            expected = (policy.sum(1).exp() * returns).sum()
            J = objective(policy.sum(1), sft.sum(1), base.sum(1), 0.3, name)
            torch.testing.assert_close(J, expected)


@pytest.mark.parametrize("kl_coef", [0.2, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("ref", ["sft", "base"])
def test_the_gap_to_the_optimum_is_the_kl_to_it(kl_coef, ref, world):
    """Gibbs: J* - J(pi) = beta KL(pi || pi*), for any pi."""
    sft, base, policy = (x.sum(1) for x in world[:3])
    best, J_best = optimum(sft, base, kl_coef, ref)
    assert best.exp().sum().item() == pytest.approx(1)
    torch.testing.assert_close(objective(best, sft, base, kl_coef, ref), J_best)
    for pi in (policy, sft, base):
        gap = J_best - objective(pi, sft, base, kl_coef, ref)
        torch.testing.assert_close(gap, kl_coef * (pi.exp() * (pi - best)).sum())


@pytest.mark.parametrize("kl_coef", [0.2, 0.5, 3.0])
def test_optimum_as_powers_of_probabilities(kl_coef, world):
    """Z = sum sft^(1 + 1/beta) base^(-1/beta), or sum base^(1 - 1/beta) sft^(1/beta)."""
    sft, base = (x.sum(1) for x in world[:2])
    p, q, a = sft.exp(), base.exp(), 1 / kl_coef
    for ref, weight in (("sft", p ** (1 + a) * q**-a), ("base", q ** (1 - a) * p**a)):
        best, J_best = optimum(sft, base, kl_coef, ref)
        torch.testing.assert_close(best.exp(), weight / weight.sum())
        torch.testing.assert_close(J_best, kl_coef * weight.sum().log())


def test_special_cases_of_the_optimum(world):
    """ref = base, beta = 1 gives sft back with J* = 0; a huge beta gives the reference."""
    sft, base = (x.sum(1) for x in world[:2])
    best, J_best = optimum(sft, base, 1.0, "base")
    torch.testing.assert_close(best, sft)
    assert J_best.item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(optimum(sft, base, 1e9, "sft")[0], sft)
    torch.testing.assert_close(optimum(sft, base, 1e9, "base")[0], base)


def test_objective_of_the_named_models(world):
    """ref = sft: J(sft) = KL(sft || base). ref = base, beta = 1: J(base) = -KL(base || sft)."""
    sft, base = (x.sum(1) for x in world[:2])
    kl = torch.nn.functional.kl_div(base, sft, log_target=True, reduction="sum")
    torch.testing.assert_close(objective(sft, sft, base, 0.7, "sft"), kl)
    kl = torch.nn.functional.kl_div(sft, base, log_target=True, reduction="sum")
    torch.testing.assert_close(objective(base, sft, base, 1.0, "base"), -kl)


def test_objective_of_a_deterministic_policy_is_its_one_response(world):
    sft, base = (x.sum(1) for x in world[:2])
    policy = torch.full_like(sft, -math.inf)
    policy[5] = 0
    expected = sft[5] - base[5] + 0.4 * sft[5]
    torch.testing.assert_close(objective(policy, sft, base, 0.4, "sft"), expected)


def test_ascending_the_objective_reaches_the_optimum(world):
    sft, base = (x.sum(1) for x in world[:2])
    best, J_best = optimum(sft, base, 1.0, "sft")
    logits = sft.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

    def step():
        optimizer.zero_grad()
        loss = -objective(logits.log_softmax(0), sft, base, 1.0, "sft")
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(step)
    J = objective(logits.detach().log_softmax(0), sft, base, 1.0, "sft")
    assert J.item() == pytest.approx(J_best.item(), abs=1e-6)
    torch.testing.assert_close(logits.detach().softmax(0), best.exp(), rtol=0, atol=1e-3)


def test_extrapolation_starts_at_base_and_passes_through_sft():
    base, sft = random(2, 4, 5, 6)
    torch.testing.assert_close(extrapolate(base, sft, 0.0), base.log_softmax(-1))
    torch.testing.assert_close(extrapolate(base, sft, 1.0), sft.log_softmax(-1))
    torch.testing.assert_close(extrapolate(base, sft + 9, 6.0), extrapolate(base - 9, sft, 6.0))


@pytest.mark.parametrize("kl_coef", [0.2, 0.5, 1.0, 2.0])
def test_on_one_token_extrapolation_is_the_optimum(kl_coef):
    base, sft = random(2, 6).log_softmax(-1)
    for ref, lam in (("sft", 1 + 1 / kl_coef), ("base", 1 / kl_coef)):
        best, _ = optimum(sft, base, kl_coef, ref)
        torch.testing.assert_close(extrapolate(base, sft, lam), best)


@pytest.mark.parametrize("elements", [1, 20, 1 << 20])
def test_extrapolated_nll_is_that_of_the_extrapolated_distribution(elements, monkeypatch):
    monkeypatch.setattr(module, "CPU_CHUNK_ELEMENTS", elements)
    base, sft = random(2, 3, 5, 6)
    ids = torch.randint(6, (3, 4), generator=torch.Generator().manual_seed(1))
    lams = torch.tensor([0.0, 1.0, 3.5, 6.0])
    # One of the two is a slice without a flat view, the other is not.
    nll = extrapolated_nll(base[:, :-1], sft[:, :-1].contiguous(), ids, lams)
    for row, lam in zip(nll, lams.tolist(), strict=True):
        weight = base[:, :-1].softmax(-1) ** (1 - lam) * sft[:, :-1].softmax(-1) ** lam
        p = weight / weight.sum(-1, keepdim=True)
        torch.testing.assert_close(row, -p.gather(-1, ids[..., None]).squeeze(-1).log())
    torch.testing.assert_close(nll[1], -token_logprobs(sft[:, :-1], ids))


@pytest.mark.parametrize("kl_coef", [0.2, 0.5, 2.0])
def test_bounded_extrapolation_is_the_optimum_of_the_bounded_reward(kl_coef):
    """By a loop over a vocabulary of nine: pi* ∝ sft exp(rho / beta)."""
    base, sft = 2 * random(2, 9)
    s, b = sft.softmax(-1).tolist(), base.softmax(-1).tolist()
    clip, alpha = 1.2, 0.2
    weights = []
    for p, q in zip(s, b, strict=True):
        rho = math.log(p / q) if p >= alpha * max(s) else math.log(p / (alpha * max(s)))
        weights.append(p * math.exp(min(max(rho, -clip), clip) / kl_coef))
    best = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    assert 0 < sum(p < alpha * max(s) for p in s) < 9
    bounds, lam = Bounds(clip, alpha), 1 + 1 / kl_coef
    torch.testing.assert_close(extrapolate(base, sft, lam, bounds).exp(), best)
    torch.testing.assert_close(extrapolate(base, sft, 1.0, bounds), sft.log_softmax(-1))
    nll = extrapolated_nll(
        base.expand(9, 9), sft.expand(9, 9), torch.arange(9), torch.tensor([1.0, lam]), bounds
    )
    torch.testing.assert_close(nll, -torch.stack([sft.log_softmax(-1), best.log()]))


def test_extrapolated_nll_is_convex_in_lambda_with_the_known_slope_at_sft():
    """d NLL / d lam at 1 = E_sft[log sft/base] - log sft/base(y): the exponential family's rule."""
    base, sft = random(2, 8, 6).log_softmax(-1)
    ids, h = torch.randint(6, (8,), generator=torch.Generator().manual_seed(1)), 1e-5
    lams = torch.tensor([1 - h, 1 + h], dtype=torch.float64)
    low, high = extrapolated_nll(base, sft, ids, lams)
    log_ratio = sft - base
    slope = (sft.exp() * log_ratio).sum(-1) - log_ratio.gather(-1, ids[:, None]).squeeze(-1)
    torch.testing.assert_close((high - low) / (2 * h), slope, rtol=1e-6, atol=1e-6)
    curve = extrapolated_nll(base, sft, ids, torch.linspace(0, 8, 17))
    assert (curve[:-2] + curve[2:] - 2 * curve[1:-1] >= -1e-12).all()


def test_half_precision_logits_are_extrapolated_in_float32_without_a_graph():
    base, sft = random(2, 4, 6).bfloat16()
    base.requires_grad_()
    ids = torch.zeros(4, dtype=torch.long)
    nll = extrapolated_nll(base, sft, ids, torch.tensor([6.0]))
    assert nll.dtype == torch.float32
    assert not nll.requires_grad
    exact = -extrapolate(base.detach().double(), sft.double(), 6.0)[:, 0]
    torch.testing.assert_close(nll[0].double(), exact, rtol=1e-5, atol=1e-5)
    assert extrapolate(base, sft, 6.0).dtype == torch.float32


def test_what_does_not_fit_is_refused():
    x = torch.zeros(4)
    with pytest.raises(ConfigError, match="'policy'"):
        optimum(x, x, 0.2, "policy")
    with pytest.raises(ShapeError, match=r"base \(3,\)"):
        objective(x, x, x[:3], 0.2, "sft")
    with pytest.raises(ShapeError, match=r"sft_logits \(2, 5\)"):
        extrapolate(torch.zeros(2, 6), torch.zeros(2, 5), 2.0)
    with pytest.raises(ShapeError, match="ids"):
        extrapolated_nll(
            torch.zeros(2, 6), torch.zeros(2, 6), torch.zeros(3, dtype=torch.long), torch.ones(1)
        )
