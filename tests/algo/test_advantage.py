import math

import pytest
import torch

from srppo.algo.advantage import gae, leave_one_out
from srppo.algo.reward import token_rewards
from srppo.errors import ShapeError

LENGTHS = torch.tensor([5, 1, 3])
MASK = torch.arange(5) < LENGTHS[:, None]


def random_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 5, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize(("gamma", "lam"), [(0.9, 0.8), (1.0, 0.95), (0.5, 1.0)])
def test_gae_is_the_discounted_sum_of_td_errors(gamma, lam):
    """A = D @ delta with D[t, s] = (gamma lam)^(s-t), s >= t: shares no recursion with `gae`."""
    rewards, values = random_batch()
    advantages, returns = gae(rewards, values, MASK, gamma, lam)
    for b, T in enumerate(LENGTHS.tolist()):
        r, v = rewards[b, :T], values[b, :T]
        delta = r + gamma * torch.cat([v[1:], v.new_zeros(1)]) - v
        power = torch.arange(T) - torch.arange(T)[:, None]
        D = torch.triu((gamma * lam) ** power.double())
        torch.testing.assert_close(advantages[b, :T], D @ delta)
        torch.testing.assert_close(returns[b, :T], D @ delta + v)


def test_lambda_return_is_the_mixture_of_n_step_returns():
    """(1 - lam) sum_n lam^(n-1) G_n + lam^(N-1) G_N (Sutton & Barto, eq. 12.3)."""
    gamma, lam = 0.9, 0.7
    rewards, values = random_batch()
    _, returns = gae(rewards, values, MASK, gamma, lam)
    for b, T in enumerate(LENGTHS.tolist()):
        for t in range(T):
            steps = T - t
            mixture = 0.0
            for n in range(1, steps + 1):
                G = sum(gamma**i * rewards[b, t + i].item() for i in range(n))
                if n < steps:
                    G += gamma**n * values[b, t + n].item()
                mixture += G * (lam ** (n - 1) * (1 - lam if n < steps else 1))
            assert returns[b, t].item() == pytest.approx(mixture)


def test_a_reward_of_one_each_step_is_a_geometric_series():
    gamma, T = 0.9, 400
    ones, zeros = torch.ones(1, T, dtype=torch.float64), torch.zeros(1, T, dtype=torch.float64)
    advantages, _ = gae(ones, zeros, torch.ones(1, T, dtype=torch.bool), gamma, 1.0)
    assert advantages[0, 0].item() == pytest.approx(1 / (1 - gamma))


def test_lambda_zero_is_the_td_error_and_lambda_one_the_return_minus_the_value():
    rewards, values = random_batch()
    next_values = torch.where(MASK.roll(-1, 1), values.roll(-1, 1), 0.0)
    next_values[:, -1] = 0
    advantages, _ = gae(rewards, values, MASK, 0.9, 0.0)
    torch.testing.assert_close(advantages[MASK], (rewards + 0.9 * next_values - values)[MASK])
    to_go = torch.where(MASK, rewards, 0.0).flip(1).cumsum(1).flip(1)
    advantages, returns = gae(rewards, values, MASK, 1.0, 1.0)
    torch.testing.assert_close(advantages[MASK], (to_go - values)[MASK])
    torch.testing.assert_close(returns[MASK], to_go[MASK])


def test_a_perfect_critic_leaves_no_advantage():
    rewards, _ = random_batch()
    values = torch.where(MASK, rewards, 0.0).flip(1).cumsum(1).flip(1)
    advantages, _ = gae(rewards, values, MASK, 1.0, 0.95)
    torch.testing.assert_close(advantages, torch.zeros_like(advantages))


def test_eos_and_token_credit_have_the_same_return_from_the_first_token_on():
    log_ratios, logprobs = random_batch()
    ref, zeros = random_batch(seed=1)[0], torch.zeros(3, 5, dtype=torch.float64)
    first = []
    for credit in ("eos", "token"):
        rewards = token_rewards(log_ratios, logprobs, ref, MASK, 0.2, credit)
        first.append(gae(rewards, zeros, MASK, 1.0, 1.0)[1][:, 0])
    torch.testing.assert_close(*first)


def test_nan_in_padding_does_not_leak_and_padding_is_zero():
    rewards, values = random_batch()
    clean = gae(rewards, values, MASK, 0.9, 0.8)
    dirty = [x.masked_fill(~MASK, math.nan) for x in (rewards, values)]
    for expected, result in zip(clean, gae(*dirty, MASK, 0.9, 0.8), strict=True):
        assert torch.equal(expected, result)
        assert (result[~MASK] == 0).all()


def test_batch_of_one_equals_batch_of_many():
    rewards, values = random_batch()
    many, _ = gae(rewards, values, MASK, 0.9, 0.8)
    for b, T in enumerate(LENGTHS.tolist()):
        one, _ = gae(rewards[b : b + 1, :T], values[b : b + 1, :T], MASK[b : b + 1, :T], 0.9, 0.8)
        assert torch.equal(many[b, :T], one[0])


def test_gae_refuses_left_padding():
    rewards, values = random_batch()
    with pytest.raises(ShapeError, match="after padding"):
        gae(rewards, values, MASK.flip(1), 1.0, 0.95)


@pytest.mark.parametrize("k", [2, 3, 6])
def test_leave_one_out_by_leaving_each_out(k):
    returns = torch.randn(12, dtype=torch.float64)
    advantages = leave_one_out(returns, k)
    for i, advantage in enumerate(advantages.tolist()):
        group = range(i - i % k, i - i % k + k)
        others = [returns[j].item() for j in group if j != i]
        assert advantage == pytest.approx(returns[i].item() - sum(others) / len(others))


def test_the_leave_one_out_gradient_is_unbiased():
    """Mean over all k-tuples of samples of (1/k) sum_i A_i d log p(y_i) = dE[R], by enumeration."""
    logits = torch.tensor([0.3, -1.0, 0.7], dtype=torch.float64, requires_grad=True)
    R = torch.tensor([2.0, -1.0, 5.0], dtype=torch.float64)
    (exact,) = torch.autograd.grad((logits.softmax(0) * R).sum(), logits)
    p, onehot = logits.detach().softmax(0), torch.eye(3, dtype=torch.float64)
    tuples = torch.cartesian_prod(*[torch.arange(3)] * 3)
    advantages = leave_one_out(R[tuples].flatten(), 3).view(-1, 3, 1)
    scores = onehot[tuples] - p
    estimate = (p[tuples].prod(1)[:, None] * (advantages * scores).mean(1)).sum(0)
    torch.testing.assert_close(estimate, exact)


@pytest.mark.parametrize("k", [0, 1, 5])
def test_groups_that_cannot_be_are_refused(k):
    with pytest.raises(ShapeError, match=f"groups of {k}"):
        leave_one_out(torch.zeros(12), k)
