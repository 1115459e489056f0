"""The oracle is enumeration: 15 responses (3 tokens, EOS among them, at most 3) to two prompts.

Exact gradient of J by autograd through every response's probability, against the estimator's
exact expectation: every batch that can be sampled, weighted with its probability.
"""

import itertools
import math

import pytest
import torch
from torch import nn

from srppo.algo.all_action import (
    all_action_advantages,
    all_action_loss,
    expected_gain,
    future_gains,
    leave_one_out_per_token,
    soft_rewards,
)
from srppo.algo.loss import clipped_policy_loss
from srppo.algo.optimum import enumerate_responses, objective
from srppo.algo.reward import UNBOUNDED, Bounds
from srppo.errors import ConfigError, ShapeError

V, EOS, T, PROMPTS, BETA = 3, 0, 3, 2, 0.3
IDS, MASK = enumerate_responses(V, EOS, T)
S = len(IDS)
CUT_OFF = ~((IDS == EOS) & MASK).any(1)
UNCLIPPED = 1e9


def states():
    """(PROMPTS, S, T, features): prompt, position and tokens so far, one-hot."""
    x = torch.zeros(PROMPTS, S, T, PROMPTS + T + T * V, dtype=torch.float64)
    for p, s, t in itertools.product(range(PROMPTS), range(S), range(T)):
        x[p, s, t, p] = x[p, s, t, PROMPTS + t] = 1
        for k in range(t):
            x[p, s, t, PROMPTS + T + k * V + IDS[s, k]] = 1
    return x


STATES = states()


def network(seed, scale=1.0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(STATES.shape[-1], 8), nn.Tanh(), nn.Linear(8, V)).double()
    with torch.no_grad():
        net[2].weight *= 4 * scale
    return net


def moved(net, by, seed=9):
    """A copy with noise of that size on every weight."""
    twin = network(0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for new, old in zip(twin.parameters(), net.parameters(), strict=True):
            noise = torch.randn(old.shape, generator=generator, dtype=torch.float64)
            new.copy_(old + by * noise)
    return twin


BASE, SFT = network(1), network(2)
POLICIES = {"near": moved(SFT, 0.05), "far": network(3, scale=2.0)}


def token_table(net):
    """(PROMPTS, S, T) nats of every token of every response; differentiable."""
    logprobs = net(STATES).log_softmax(-1)
    return logprobs.gather(3, IDS.expand(PROMPTS, S, T)[..., None]).squeeze(3)


def exact_objective(net, ref="sft", bounds=UNBOUNDED, penalty=0.0):
    """J(net), mean over the prompts, as a sum over all responses."""
    policy, sft, base = (token_table(m) for m in (net, SFT, BASE))
    ratios = sft - base
    if bounds.plausibility:
        floor = math.log(bounds.plausibility) + SFT(STATES).log_softmax(-1).amax(-1)
        ratios = torch.where(sft < floor, sft - floor, ratios)
    if bounds.clip:
        ratios = ratios.clamp(-bounds.clip, bounds.clip)
    kl = policy - (sft if ref == "sft" else base)
    gains = torch.where(MASK, ratios - BETA * kl, 0.0).sum(2) - penalty * CUT_OFF
    return (torch.where(MASK, policy, 0.0).sum(2).exp() * gains).sum(1).mean()


def gradient(value, net):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(net.parameters()))])


# What each row of a batch answers, and how many responses a prompt gets.
BATCHES = {
    "none": ([0, 1], 1),
    "batch": ([0, 1], 1),  # the other prompt's response is the baseline
    "prompt": ([0, 0, 1, 1], 2),  # mostly the prompt's other response
}


def expected_loss(
    net, old, baseline, share=0.0, ref="sft", bounds=UNBOUNDED, penalty=0.0, gamma=1.0, keep="both"
):
    """The loss expected over all batches that `old` can sample; its gradient is the estimator's.

    `keep`: "immediate" or "future" drops the other part.
    """
    with torch.no_grad():
        sft, base = (m(STATES).flatten(0, 2) for m in (SFT, BASE))
        soft = soft_rewards(sft, base, BETA, ref, bounds)
        gains = expected_gain(old(STATES).flatten(0, 2), soft, BETA).view(PROMPTS, S, T)
        old_logprobs = token_table(old)
        ids = IDS.expand(PROMPTS, S, T)
        rewards = soft.view(PROMPTS, S, T, V).gather(3, ids[..., None]).squeeze(3)
        rewards = rewards - BETA * old_logprobs
        p = torch.where(MASK, old_logprobs, 0.0).sum(2).exp()
    x, group_size = torch.tensor(BATCHES[baseline][0]), BATCHES[baseline][1]
    y = torch.cartesian_prod(*[torch.arange(S)] * len(x))  # every batch: (S^N, N) responses
    x = x.expand_as(y)
    weights = p[x, y].prod(1)
    mask, terminal = MASK[y], -penalty * CUT_OFF[y].double()
    if baseline == "none":
        noise = share * (rewards - gains)
        future = future_gains((gains + noise)[x, y], mask, gamma, terminal)
        advantages = noise[x, y] + future
    else:
        advantages = all_action_advantages(
            gains[x, y], rewards[x, y], mask, group_size, share, gamma, terminal
        )
    if keep == "immediate":
        advantages = torch.zeros_like(advantages)
    # The flat tokens of all batches, as the trainer would hand them over.
    rows = torch.arange(PROMPTS * S * T).view(PROMPTS, S, T)[x, y][mask]
    logits = net(STATES).flatten(0, 2)[rows]
    tokens = ids.flatten()[rows], old_logprobs.flatten()[rows], advantages[mask]
    losses = all_action_loss(logits, soft[rows], *tokens, BETA, share, UNCLIPPED)
    if keep == "future":
        losses = losses + (1 - share) * expected_gain(logits, soft[rows], BETA)
    per_token = weights[:, None, None].expand(mask.shape) / y.shape[1]
    return (losses * per_token[mask]).sum()


def relative_error(found, exact):
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("ref", ["sft", "base"])
@pytest.mark.parametrize("baseline", list(BATCHES))
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_estimator_is_unbiased(name, ref, baseline, share):
    policy = POLICIES[name]
    exact = gradient(exact_objective(policy, ref), policy)
    found = gradient(-expected_loss(policy, policy, baseline, share, ref), policy)
    assert relative_error(found, exact) < 1e-6


def test_the_exact_objective_is_the_one_of_optimum():
    tables = [torch.where(MASK, token_table(m), 0.0).sum(2) for m in (POLICIES["far"], SFT, BASE)]
    for ref in ("sft", "base"):
        J = sum(objective(*(x[p] for x in tables), BETA, ref) for p in range(PROMPTS)) / PROMPTS
        torch.testing.assert_close(exact_objective(POLICIES["far"], ref), J)


@pytest.mark.parametrize(
    "options",
    [{"bounds": Bounds(clip=0.5)}, {"bounds": Bounds(plausibility=0.7)}, {"penalty": 2.0}],
)
@pytest.mark.parametrize("baseline", ["batch", "prompt"])
def test_it_stays_unbiased_with_the_options_of_the_reward(options, baseline):
    policy = POLICIES["near"]
    exact = gradient(exact_objective(policy, **options), policy)
    plain = gradient(exact_objective(policy), policy)
    assert relative_error(plain, exact) > 0.05  # the option changes the gradient
    found = gradient(-expected_loss(policy, policy, baseline, 0.5, **options), policy)
    assert relative_error(found, exact) < 1e-6


@pytest.mark.parametrize("name", POLICIES)
def test_neither_part_alone_is_the_gradient(name):
    policy = POLICIES[name]
    exact = gradient(exact_objective(policy), policy)
    for part in ("immediate", "future"):
        found = gradient(-expected_loss(policy, policy, "batch", keep=part), policy)
        assert relative_error(found, exact) > 0.05


def test_a_discount_is_biased():
    policy = POLICIES["far"]
    exact = gradient(exact_objective(policy), policy)
    found = gradient(-expected_loss(policy, policy, "batch", gamma=0.5), policy)
    assert relative_error(found, exact) > 0.01


def exact_values(net):
    """Each (PROMPTS, S, T): what `net` still earns before each token, and after it."""
    with torch.no_grad():
        tokens, sft, base = (token_table(m) for m in (net, SFT, BASE))
        earned = torch.where(MASK, sft - base - BETA * (tokens - sft), 0.0)
        p = torch.where(MASK, tokens, 0.0).sum(2).exp()
    values = []
    for length in range(T + 1):
        same = (IDS[:, None, :length] == IDS[:, :length]).all(2).double()  # prefix, pairwise
        values.append((p * earned[:, :, length:].sum(2)) @ same / (p @ same))
    values = torch.stack(values, dim=2)
    return values[:, :, :-1], values[:, :, 1:]


def test_at_another_policy_only_the_states_are_those_of_the_old_one():
    """Two statements about theta away from old.

    J(theta) - J(old) = E_theta sum_t [sum_a pi_theta (g_theta + V_old(s a)) - V_old(s)], states
    from theta; and the unclipped loss has the gradient of the same sum with states from old
    (with (1 - c) g_theta + c g_old where the share c of the rewards is sampled).
    """
    old, new = POLICIES["near"], moved(POLICIES["near"], 0.2, seed=4)
    before, after = exact_values(old)
    tokens, old_tokens = token_table(new), token_table(old)
    gains = token_table(SFT) * (1 + BETA) - token_table(BASE) - BETA * tokens
    p_new = torch.where(MASK, tokens, 0.0).sum(2).exp()
    step = torch.where(MASK, gains + after - before, 0.0).sum(2)
    difference = exact_objective(new) - exact_objective(old)
    torch.testing.assert_close((p_new * step).sum(1).mean(), difference)

    p_old = torch.where(MASK, old_tokens, 0.0).sum(2).exp().detach()
    for share, baseline in itertools.product((0.0, 0.5, 1.0), BATCHES):
        moved_by = token_table(new) - old_tokens.detach()
        gain = gains.detach() + share * BETA * moved_by.detach()
        terms = torch.where(MASK, moved_by.exp() * (gain + after), 0.0).sum(2)  # a, sampled by old
        exact = gradient((p_old * terms).sum(1).mean(), new)
        found = gradient(-expected_loss(new, old, baseline, share), new)
        assert relative_error(found, exact) < 1e-6


def random_logits(*shape, seed=0):
    return 2 * torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def test_gains_by_a_loop_over_the_vocabulary():
    policy, sft, base = random_logits(3, 4, 7)
    for ref, clip in itertools.product(("sft", "base"), (None, 0.8)):
        soft = soft_rewards(sft, base, BETA, ref, Bounds(clip))
        found = expected_gain(policy, soft, BETA)
        for n in range(4):
            p, s, b = ((x[n].exp() / x[n].exp().sum()).tolist() for x in (policy, sft, base))
            total = 0.0
            for a in range(7):
                ratio = math.log(s[a] / b[a])
                ratio = ratio if clip is None else min(max(ratio, -clip), clip)
                total += p[a] * (ratio - BETA * math.log(p[a] / (s if ref == "sft" else b)[a]))
            assert found[n].item() == pytest.approx(total)


def test_the_gradient_of_the_gain_is_the_probability_times_the_advantage():
    """d gbar / d logits_a = pi(a) (g(a) - gbar)."""
    policy, sft, base = random_logits(3, 4, 7)
    policy.requires_grad_()
    soft = soft_rewards(sft, base, BETA, "sft")
    gain = expected_gain(policy, soft, BETA)
    (found,) = torch.autograd.grad(gain.sum(), policy)
    logprobs = policy.detach().log_softmax(1)
    expected = logprobs.exp() * (soft - BETA * logprobs - gain.detach()[:, None])
    torch.testing.assert_close(found, expected)


def test_the_gain_is_largest_at_the_tilted_distribution():
    """gbar = beta log Z - beta KL(pi || pi*) with pi* ∝ exp(u / beta), in every state."""
    policy, sft, base = random_logits(3, 4, 7)
    soft = soft_rewards(sft, base, BETA, "base")
    best = (soft / BETA).log_softmax(1)
    torch.testing.assert_close(
        expected_gain(soft / BETA, soft, BETA), BETA * (soft / BETA).logsumexp(1)
    )
    logprobs = policy.log_softmax(1)
    kl = (logprobs.exp() * (logprobs - best)).sum(1)
    gap = expected_gain(best, soft, BETA) - expected_gain(policy, soft, BETA)
    torch.testing.assert_close(gap, BETA * kl)


LENGTHS = torch.tensor([5, 1, 3, 4])
PADDED = torch.arange(5) < LENGTHS[:, None]


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_the_future_by_loops(gamma):
    gains, terminal = random_logits(4, 5), random_logits(4, seed=1)
    dirty = gains.masked_fill(~PADDED, math.nan)
    future = future_gains(dirty, PADDED, gamma, terminal)
    for b, length in enumerate(LENGTHS.tolist()):
        for t in range(length):
            expected = sum(gamma ** (k - t) * gains[b, k].item() for k in range(t + 1, length))
            expected += gamma ** (length - 1 - t) * terminal[b].item()
            assert future[b, t].item() == pytest.approx(expected)
    assert (future[~PADDED] == 0).all()
    without = future_gains(dirty, PADDED, gamma)
    torch.testing.assert_close(without, future_gains(dirty, PADDED, gamma, torch.zeros(4)))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_baseline_is_the_prompts_mean_with_the_batchs_as_one_more_response(k):
    future = random_logits(4, 5)
    advantages = leave_one_out_per_token(future.masked_fill(~PADDED, math.nan), PADDED, k)
    for b, t in itertools.product(range(4), range(5)):
        others = [j for j in range(4) if j != b and PADDED[j, t]]
        values = [future[j, t].item() for j in others if j // k == b // k]
        if others:
            values.append(sum(future[j, t].item() for j in others) / len(others))
        baseline = sum(values) / len(values) if others else 0.0
        expected = future[b, t].item() - baseline if PADDED[b, t] else 0.0
        assert advantages[b, t].item() == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_worked_on_in_float32(dtype):
    policy, sft, base = random_logits(3, 6, 1000).to(dtype)
    policy.requires_grad_()
    ids, (old, advantages) = torch.arange(6), random_logits(2, 6).float()

    def losses(*logits):
        soft = soft_rewards(logits[1], logits[2], BETA, "sft")
        return all_action_loss(logits[0], soft, ids, old, advantages, BETA, 0.5, 0.2)

    half, full = losses(policy, sft, base), losses(policy.double(), sft.double(), base.double())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), full, rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(half.sum(), policy)
    assert grad.dtype == dtype


def test_the_loss_is_the_two_parts():
    policy, sft, base = random_logits(3, 6, 7)
    ids, (old, advantages) = torch.arange(6), random_logits(2, 6, seed=1)
    old = old - 2
    soft = soft_rewards(sft, base, BETA, "sft")
    losses = all_action_loss(policy, soft, ids, old, advantages, BETA, 0.25, 0.2)
    chosen = policy.log_softmax(1)[torch.arange(6), ids]
    clipped = clipped_policy_loss(chosen, old, advantages, 0.2)
    torch.testing.assert_close(losses, clipped - 0.75 * expected_gain(policy, soft, BETA))


def test_what_does_not_fit_is_refused():
    x = torch.zeros(4, 5)
    with pytest.raises(ConfigError, match="ref='none'"):
        soft_rewards(x, x, BETA, "none")
    with pytest.raises(ShapeError, match="shapes differ"):
        soft_rewards(x, x[:, :4], BETA, "sft")
    with pytest.raises(ShapeError, match="shapes differ"):
        expected_gain(x, x[:1], BETA)
    with pytest.raises(ShapeError, match="after padding"):
        future_gains(x, PADDED.flip(1))
    for k in (0, 3, 8):
        with pytest.raises(ShapeError, match=f"groups of {k}"):
            leave_one_out_per_token(x, PADDED, k)
