"""Continuous batching by transformers itself, on a CPU."""

from __future__ import annotations

import inspect
import itertools
import math

import pytest
import torch
from transformers import ContinuousBatchingConfig
from transformers.generation.continuous_batching import ContinuousMixin

import tiny
from enumerable import EOS
from srppo import distributed
from srppo.config import LoRAConfig
from srppo.errors import EngineError
from srppo.models.lora import Backbone
from srppo.models.roles import Role
from srppo.models.scoring import score
from srppo.rollout import continuous
from srppo.rollout.continuous import ContinuousSampler

PROMPTS = tiny.sequences(seed=5, n=12).prompt_ids


def sampler_of(policy, **options):
    return ContinuousSampler(policy, eos_token_id=EOS, max_new_tokens=6, **options)


def rows(rollout):
    return [tiny.row(rollout.sequences, i)[1] for i in range(len(rollout.sequences))]


@pytest.fixture
def policy():
    return Role(tiny.model(seed=0))


def test_responses_are_the_policys_and_so_are_their_logprobs(policy):
    sampler = sampler_of(policy)
    for seed in range(2):  # as it is now, without being told
        policy.model.load_state_dict(tiny.model(seed=seed).state_dict())
        sampler.update_weights()
        rollout = sampler.sample(PROMPTS, seed=1)
        y = rollout.sequences
        assert y.prompt_ids == PROMPTS
        torch.testing.assert_close(rollout.logprobs, score(policy, y, 1000), atol=1e-4, rtol=0)
        assert not rollout.exact
        for response, ended in zip(rows(rollout), rollout.ended.tolist(), strict=True):
            assert EOS not in response[:-1]
            assert (response[-1] == EOS) == ended
            assert ended or len(response) == 6


def test_a_seed_decides_the_responses_and_equal_prompts_get_their_own(policy):
    sampler = sampler_of(policy)
    first = rows(sampler.sample([[1, 2]] * 12, seed=4))
    assert rows(sampler.sample([[1, 2]] * 12, seed=4)) == first
    assert rows(sampler.sample([[1, 2]] * 12, seed=5)) != first
    assert len(set(map(tuple, first))) > 6


def test_an_adapter_is_in_force_while_it_samples():
    backbone = Backbone(tiny.model(seed=0), LoRAConfig(rank=2), seed=0)
    policy = backbone.new()
    for p in policy.parameters():
        torch.nn.init.normal_(p, std=0.3)
    rollout = sampler_of(policy).sample(PROMPTS, seed=1)
    y = rollout.sequences
    torch.testing.assert_close(rollout.logprobs, score(policy, y, 1000), atol=1e-4, rtol=0)
    assert (rollout.logprobs - score(backbone.bare(), y, 1000)).abs().max() > 0.1


def test_with_bfloat16_it_is_a_copy_that_follows_the_policy(policy):
    sampler = sampler_of(policy, compute="bfloat16")
    policy.model.load_state_dict(tiny.model(seed=4).state_dict())
    sampler.update_weights()
    rollout = sampler.sample(PROMPTS, seed=1)
    off = (rollout.logprobs - score(policy, rollout.sequences, 1000)).abs()
    assert 1e-5 < off.max() < 0.3
    assert policy.model.dtype == torch.float32


def test_the_policy_is_as_it_was_and_still_trains(policy):
    before = policy.model.config._attn_implementation
    sampler_of(policy).sample(PROMPTS, seed=1)
    assert policy.model.config._attn_implementation == before
    policy.model(torch.tensor([[1, 2]])).logits.sum().backward()
    assert all(p.grad is not None for p in policy.parameters())


def test_seeds_of_processes_and_of_consecutive_steps_are_far_apart(monkeypatch):
    """transformers adds small numbers of its own to them."""
    monkeypatch.setattr(distributed, "size", lambda: 4)
    drawn = sorted(seed for step in range(100) for seed in continuous._seeds(1_000 + step))
    assert len(drawn) == 400
    assert min(b - a for a, b in itertools.pairwise(drawn)) > 1_000_000


class Output:
    """What GenerationOutput has of use."""

    def __init__(self, ids, logprobs, error=None):
        self.generated_tokens, self.logprobs, self.error = ids, logprobs, error


BROKEN = {
    "a response less": ([Output([1], [-1.0])], "1 of 2 responses are missing"),
    "an error": ([Output([1], [-1.0]), Output([1], [-1.0], "no memory")], "no memory"),
    "a logprob less": ([Output([1], [-1.0]), Output([1, 2], [-1.0])], "a response failed"),
    "no number": ([Output([1], [-1.0]), Output([1], [math.nan])], "no numbers"),
}


@pytest.mark.parametrize("kind", list(BROKEN))
def test_what_generate_batch_only_logs_ends_the_step(policy, monkeypatch, kind):
    outputs, said = BROKEN[kind]

    def generate_batch(inputs, **kwargs):
        inspect.signature(ContinuousMixin.generate_batch).bind(None, inputs, **kwargs)
        assert isinstance(kwargs["continuous_batching_config"], ContinuousBatchingConfig)
        return dict(enumerate(outputs))

    monkeypatch.setattr(policy.model, "generate_batch", generate_batch)
    with pytest.raises(EngineError, match=said):
        sampler_of(policy).sample([[1], [2]], seed=0)
