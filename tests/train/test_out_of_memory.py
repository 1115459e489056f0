"""Memory that runs out within a step: the same step in smaller passes, and so from then on.

A limit on the tokens of a pass stands for the memory; what is over it raises torch's own error.
"""

import json

import pytest
import torch

import tiny
from enumerable import EOS, LENGTH, PROMPTS, fine_tuned, tiny_llama
from srppo.config import PPOConfig, SFTConfig
from srppo.config_checkpoint import CheckpointConfig
from srppo.data.chat import Example
from srppo.models.memory import Budget
from srppo.models.roles import Roles
from srppo.progress import Reporter
from srppo.rollout.hf import HFSampler
from srppo.train.metrics import MetricsLog
from srppo.train.ppo import train_ppo
from srppo.train.sft import train_sft
from srppo.train.steps import Keeper

LIMIT = 20


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def limited(model, limit, backward=False, seen=None):
    """Its trunk runs out of memory over more than `limit` tokens, at once or in the backward pass,
    when gradients have been made of some of it."""

    def check(module, args, kwargs, output):
        ids = kwargs["input_ids"]
        if seen is not None:
            seen.append(ids.numel())
        if ids.numel() <= limit:
            return
        if not backward:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if torch.is_grad_enabled():
            first = next(iter(module.layers)).input_layernorm.weight
            first.grad = torch.full_like(first, 1e3)  # half-made, and wrong

            def fail(gradient):
                raise torch.OutOfMemoryError("CUDA out of memory.")

            output.last_hidden_state.register_hook(fail)

    return model.base_model.register_forward_hook(check, with_kwargs=True)


@pytest.fixture(scope="module")
def pair():
    base = tiny_llama(seed=0)
    return base, fine_tuned(base, seed=0)


@pytest.fixture
def train(pair, tmp_path):
    """Two steps of PPO, of which `spoil(roles)` may take memory; policy, log and budget."""

    def run(spoil=lambda roles: None, tokens=1000, keeper=None, **settings):
        config = PPOConfig(
            **{
                "steps": 2,
                "rollouts_per_step": 16,
                "minibatch_size": 8,
                "learning_rate": 1e-3,
                "max_tokens_per_batch": tokens,
                **settings,
            }
        )
        roles = Roles.begin(*pair, critic=config.estimator == "ppo")
        hook = spoil(roles)
        budget = Budget(config.max_tokens_per_batch)
        sampler = HFSampler(
            roles.policy,
            eos_token_id=EOS,
            max_new_tokens=LENGTH,
            max_tokens_per_batch=budget,
            critic=roles.critic,
        )
        with MetricsLog(tmp_path, "ppo") as log:
            train_ppo(
                roles,
                sampler,
                PROMPTS,
                config,
                seed=0,
                log=log,
                reporter=Reporter(quiet=True),
                keeper=keeper,
                budget=budget,
            )
        if hook:
            hook.remove()
        lines = [json.loads(x) for x in (tmp_path / "metrics/ppo.jsonl").read_text().splitlines()]
        return weights_of(roles.policy.model), lines, budget

    return run


ESTIMATORS = {
    "ppo": {},
    "rloo": {"estimator": "rloo", "responses_per_prompt": 2},
    "all_action": {"estimator": "all_action"},
}
PLACES = {
    "the policy": lambda roles: limited(roles.policy.model, LIMIT),
    "the policy, going backward": lambda roles: limited(roles.policy.model, LIMIT, backward=True),
    "a frozen model": lambda roles: limited(roles.base.model, LIMIT),
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("place", PLACES)
def test_a_step_of_stage_2_in_smaller_passes_is_the_same(train, estimator, place):
    whole, expected, untouched = train(**ESTIMATORS[estimator])
    assert untouched.size == 1000
    weights, lines, budget = train(PLACES[place], **ESTIMATORS[estimator])
    assert budget.size <= 2 * LIMIT  # a batch of one row may be longer
    torch.testing.assert_close(weights, whole, atol=1e-5, rtol=1e-4)
    for line, other in zip(lines, expected, strict=True):
        for key in ("reward", "kl_sft", "policy_loss", "grad_norm"):
            assert line[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5)


def test_without_the_repetition_it_would_be_an_error(train):
    with pytest.raises(RuntimeError, match="not the error of memory"):
        train(lambda roles: roles.policy.model.base_model.register_forward_hook(_raise))


def _raise(*args):
    raise RuntimeError("not the error of memory")


def test_the_smaller_size_is_remembered_over_an_interruption(train, tmp_path):
    settings = CheckpointConfig(every=1)
    _, _, before = train(
        PLACES["the policy"], keeper=Keeper(tmp_path, "ppo", settings, Reporter(quiet=True))
    )
    _, _, after = train(keeper=Keeper(tmp_path, "ppo", settings, Reporter(quiet=True)), steps=3)
    assert before.size == after.size < 1000


def sft(tmp_path, **limits):
    """Three optimizer steps of stage 1; the model, and the tokens of its passes."""
    model, seen = tiny.model(), []
    hook = limited(model, **{"limit": 10**6, **limits}, seen=seen)
    y = tiny.sequences(n=12)
    with MetricsLog(tmp_path, "sft") as log:
        train_sft(
            model,
            tiny.tokenizer(),
            [Example(*tiny.row(y, i)) for i in range(12)],
            SFTConfig(
                epochs=1,
                batch_size=8,
                micro_batch_size=4,
                optimizer="sgd",
                learning_rate=0.1,
            ),
            seed=0,
            log=log,
            reporter=Reporter(quiet=True),
        )
    hook.remove()
    lines = [json.loads(x) for x in (tmp_path / "metrics/sft.jsonl").read_text().splitlines()]
    return weights_of(model), seen, lines


@pytest.mark.parametrize("backward", [False, True])
def test_a_step_of_stage_1_in_smaller_passes_is_the_same(tmp_path, backward):
    whole, passes, expected = sft(tmp_path)
    weights, seen, lines = sft(tmp_path, limit=max(passes) - 1, backward=backward)
    assert len(seen) > len(passes)
    torch.testing.assert_close(weights, whole, atol=1e-6, rtol=1e-5)
    for line, other in zip(lines, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
