"""The all-action estimator in the trainer: states kept, distributions made again, one gradient."""

from dataclasses import replace

import pytest
import torch

import tiny
from srppo.algo.all_action import expected_gain, soft_rewards
from srppo.algo.reward import Bounds
from srppo.config import PPOConfig
from srppo.models.batching import make_batch
from srppo.models.roles import Roles
from srppo.models.scoring import chunks, response_states, score
from srppo.rollout.sampler import Rollout
from srppo.train.all_action import frozen_states, score_all_actions
from srppo.train.ppo import advantages_of, rewards_of, score_rollout
from srppo.train.update import Experience, accumulate

ONE_BATCH = 10**6
ROWS = torch.arange(9)


def config_of(**settings):
    return PPOConfig(**{"estimator": "all_action", "kl_coef": 0.3, **settings})


@pytest.fixture
def roles():
    """A policy that has moved away from sft."""
    roles = Roles.begin(tiny.model(seed=0), tiny.model(seed=1), critic=False)
    torch.manual_seed(2)
    with torch.no_grad():
        for p in roles.policy.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return roles


@pytest.fixture
def rollout(roles):
    y = tiny.sequences(n=9)
    ended = torch.ones(9, dtype=torch.bool)
    return Rollout(y, score(roles.policy, y, ONE_BATCH), ended, exact=True)


def plain_logits(role, y, i):
    """(T, V) of one row by a plain forward."""
    prompt, response = tiny.row(y, i)
    with torch.no_grad():
        return role(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]


def experience_of(roles, rollout, config):
    scores = score_rollout(roles, rollout, config)
    rewards = rewards_of(rollout, scores, config)
    zero = torch.zeros_like(rewards)
    advantages, _ = advantages_of(rewards, zero, scores, rollout, config)
    return Experience(rollout, scores.policy, zero, advantages, zero, scores.frozen)


def gradients(role):
    return torch.cat([p.grad.flatten() for p in role.parameters()])


@pytest.mark.parametrize("budget", [1, 40, ONE_BATCH])
def test_states_are_kept_in_the_order_of_the_responses(roles, rollout, budget):
    y = rollout.sequences
    states = response_states(roles.sft, y, budget)
    assert len(states) == int(y.mask.sum())
    head = roles.sft.model.lm_head
    start = 0
    for i in range(len(y)):
        n = int(y.lengths[i])
        found = head(states[start : start + n])
        torch.testing.assert_close(found, plain_logits(roles.sft, y, i), atol=1e-4, rtol=0)
        start += n


def test_frozen_distributions_are_those_of_the_batchs_tokens(roles, rollout, monkeypatch):
    monkeypatch.setattr("srppo.algo.logprobs.CPU_CHUNK_ELEMENTS", 4 * tiny.VOCAB)
    y = rollout.sequences
    frozen = frozen_states(roles, y, 40)
    batch = make_batch(y, torch.tensor([5, 0, 3]), torch.device("cpu"))
    pieces = [frozen.logits(roles, batch, some) for some in chunks(roles.sft.model, batch)]
    assert len(pieces) > 2
    for role, parts in zip((roles.sft, roles.base), zip(*pieces, strict=True), strict=True):
        expected = torch.cat([plain_logits(role, y, i) for i in (5, 0, 3)])
        torch.testing.assert_close(torch.cat(parts), expected, atol=1e-4, rtol=0)


def test_scores_and_gains_are_those_of_plain_forwards(roles, rollout):
    y, config = rollout.sequences, config_of(kl_ref="base", token_clip=2.0, plausibility=0.3)
    frozen = frozen_states(roles, y, 40)
    policy, sft, base, margins, gains = score_all_actions(roles, y, frozen, config)
    for role, found in ((roles.policy, policy), (roles.sft, sft), (roles.base, base)):
        torch.testing.assert_close(found, score(role, y, ONE_BATCH), atol=1e-5, rtol=0)
    for i in range(len(y)):
        logits = [plain_logits(role, y, i) for role in (roles.policy, roles.sft, roles.base)]
        soft = soft_rewards(*logits[1:], 0.3, "base", Bounds(2.0, 0.3))
        expected = expected_gain(logits[0], soft, 0.3)
        below = logits[1].log_softmax(-1).amax(-1) + margins[i][y.mask[i]]
        torch.testing.assert_close(below, sft[i][y.mask[i]], atol=1e-4, rtol=0)
        torch.testing.assert_close(gains[i][y.mask[i]], expected, atol=1e-4, rtol=0)
    assert (gains[~y.mask] == 0).all()


@pytest.mark.parametrize("budget", [1, 60])
def test_neither_microbatches_nor_chunks_change_the_gradient(roles, rollout, budget, monkeypatch):
    config = config_of()
    accumulate(roles, experience_of(roles, rollout, config), ROWS, config)
    whole = gradients(roles.policy)
    roles.policy.model.zero_grad()
    monkeypatch.setattr("srppo.algo.logprobs.CPU_CHUNK_ELEMENTS", 3 * tiny.VOCAB)
    split = config_of(max_tokens_per_batch=budget)
    accumulate(roles, experience_of(roles, rollout, split), ROWS, split)
    torch.testing.assert_close(gradients(roles.policy), whole, atol=1e-5, rtol=1e-4)
    assert whole.norm() > 1e-3


def test_with_all_of_the_sampled_share_it_is_reinforce_with_the_reward_to_go(roles, rollout):
    """c = 1: mean over tokens of -grad log pi (reward to go, less its mean over the others), by
    plain forwards and without anything of the vocabulary's other tokens."""
    config = config_of(sampled_share=1.0)
    accumulate(roles, experience_of(roles, rollout, config), ROWS, config)
    found = gradients(roles.policy)
    roles.policy.model.zero_grad()

    y = rollout.sequences
    rewards = rewards_of(rollout, score_rollout(roles, rollout, config), config)
    after = rewards.flip(1).cumsum(1).flip(1) - rewards
    total = torch.tensor(0.0)
    for i in range(len(y)):
        prompt, response = tiny.row(y, i)
        logits = roles.policy(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).squeeze(1)
        gains = score_rollout(roles, rollout, config).gains[i]
        for t in range(len(response)):
            others = [j for j in range(len(y)) if j != i and y.mask[j, t]]
            baseline = after[others, t].mean() if others else 0.0
            advantage = rewards[i, t] - gains[t] + after[i, t] - baseline
            total = total - logprobs[t] * advantage
    (total / int(y.mask.sum())).backward()
    torch.testing.assert_close(found, gradients(roles.policy), atol=1e-5, rtol=1e-3)


def test_a_response_that_was_cut_off_pays_for_it_at_every_token(roles, rollout):
    config = config_of(missing_eos_penalty=5.0, responses_per_prompt=3, rollouts_per_step=9)
    cut = replace(rollout, ended=torch.tensor([True] * 8 + [False]))
    plain, fined = (experience_of(roles, r, config).advantages for r in (rollout, cut))
    y = rollout.sequences
    change = (fined - plain)[8][y.mask[8]]
    torch.testing.assert_close(change, torch.full_like(change, -5.0))
