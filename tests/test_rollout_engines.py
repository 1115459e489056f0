"""Stage 2 with a vLLM server beside stage 2 in process; the server is the stand-in."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from fastapi import HTTPException

from enumerable import EOS, LENGTH, PROMPTS, fine_tuned, tiny_llama
from processes import as_numpy, model_config, together, write_models
from runs import json_lines, srppo_command, timeless, write_recipe
from srppo.config import PPOConfig
from srppo.config_rollout import RolloutConfig
from srppo.errors import TrainingError
from srppo.miniature import BASE
from srppo.models.load import load_model
from srppo.models.roles import Role, Roles
from srppo.models.start import start_frozen
from srppo.progress import Reporter
from srppo.rollout.hf import HFSampler
from srppo.rollout.vllm import VLLMSampler
from srppo.train import ppo
from srppo.train.metrics import MetricsLog
from srppo.train.ppo import train_ppo
from vllm_stand_in import StandIn, serving

STEPS, N = 3, 8
CONFIG = PPOConfig(
    steps=STEPS, rollouts_per_step=N, minibatch_size=4, learning_rate=1e-2, kl_coef=0.5, max_kl=1e9
)


@pytest.fixture(scope="module")
def pair():
    base = tiny_llama(seed=0)
    return base, fine_tuned(base, seed=0)


def by_server(policy, url, tmp_path):
    return VLLMSampler(
        policy,
        RolloutConfig(engine="vllm", url=url, weight_dtype="float32", patience=2.0),
        tmp_path / "weights",
        eos_token_id=EOS,
        max_new_tokens=LENGTH,
        longest=8,
    )


def train(tmp_path, roles, sampler, **options):
    """The log's lines, and the policy's weights at the end."""
    tmp_path.mkdir(exist_ok=True)
    with MetricsLog(tmp_path, "ppo") as log:
        train_ppo(
            roles,
            sampler,
            PROMPTS,
            CONFIG,
            seed=0,
            log=log,
            reporter=Reporter(quiet=True),
            **options,
        )
    weights = torch.cat([p.detach().flatten() for p in roles.policy.parameters()])
    return json_lines(tmp_path / "metrics" / "ppo.jsonl"), weights


def in_process(roles):
    return HFSampler(roles.policy, eos_token_id=EOS, max_new_tokens=LENGTH, critic=roles.critic)


def the_same_numbers(seed: int) -> dict[int, torch.Tensor]:
    """For each request of each step the uniform numbers that HFSampler draws in its place."""
    numbers = {}
    for step in range(1, STEPS + 1):
        stream = ppo._seed(seed, "rollout", step)
        seeds = torch.randint(2**63 - 1, (N,), generator=torch.Generator().manual_seed(stream))
        uniforms = torch.rand(N, LENGTH, generator=torch.Generator().manual_seed(stream))
        numbers |= dict(zip(seeds.tolist(), uniforms, strict=True))
    return numbers


def test_with_the_same_random_numbers_it_is_the_same_training(pair, tmp_path):
    """Rollouts, rewards, losses and weights of three steps: what differs is rounding."""
    here = Roles.begin(*pair, critic=True)
    expected, weights = train(tmp_path / "here", here, in_process(here))
    there = Roles.begin(*pair, critic=True)
    state = StandIn(pair[0])
    state.uniforms = the_same_numbers(seed=0)
    with serving(state) as url:
        sampler = by_server(there.policy, url, tmp_path)
        lines, found = train(tmp_path / "there", there, sampler)
    assert len(state.requests) == STEPS * N
    for line, other in zip(lines, expected, strict=True):
        for key in other.keys() - {"sampler_logprob_diff"}:
            if not key.startswith("time/"):
                assert line[key] == pytest.approx(other[key], abs=1e-4, rel=1e-4), key
        assert line["sampler_logprob_diff"] <= line["sampler_logprob_max"] < 1e-5
        assert abs(line["sampler_kl"]) < 1e-6
    torch.testing.assert_close(found, weights, atol=1e-4, rtol=0)


class Shifted(HFSampler):
    """As a server would be that thinks every sampled token e^0.3 times less likely."""

    def sample(self, prompts, seed):
        rollout = super().sample(prompts, seed)
        return replace(rollout, logprobs=rollout.logprobs - 0.3, exact=False)


def test_the_weights_reach_the_loss(pair, tmp_path):
    def first(name, cap):
        roles = Roles.begin(*pair, critic=False)
        sampler = Shifted(roles.policy, eos_token_id=EOS, max_new_tokens=LENGTH)
        config = CONFIG.model_copy(
            update={"estimator": "rloo", "responses_per_prompt": 2, "minibatch_size": N}
        )
        (tmp_path / name).mkdir()
        with MetricsLog(tmp_path / name, "ppo") as log:
            train_ppo(
                roles, sampler, PROMPTS, config, seed=0, log=log, reporter=Reporter(quiet=True),
                importance_cap=cap,
            )  # fmt: skip
        return json_lines(tmp_path / name / "metrics" / "ppo.jsonl")[0]

    without, weighed, capped = first("a", None), first("b", 10.0), first("c", 1.1)
    factor = 2.718281828**0.3
    assert weighed["importance_weight"] == pytest.approx(factor, abs=1e-5)
    assert (weighed["importance_capped"], capped["importance_capped"]) == (0, 1)
    assert weighed["grad_norm"] == pytest.approx(factor * without["grad_norm"], rel=1e-4)
    assert capped["grad_norm"] == pytest.approx(1.1 * without["grad_norm"], rel=1e-4)
    assert without["sampler_logprob_diff"] == pytest.approx(0.3, abs=1e-5)
    assert "importance_weight" not in without


def test_another_models_responses_are_not_trained_on(pair, tmp_path):
    """The server says that it has taken the weights, and has not."""
    roles = Roles.begin(*pair, critic=False)
    before = torch.cat([p.detach().flatten().clone() for p in roles.policy.parameters()])
    state = StandIn(tiny_llama(seed=9, width=32))
    for p in state.first.parameters():
        p.data *= 3
    state.restart()
    state.load = lambda directory: None
    with serving(state) as url:
        sampler = by_server(roles.policy, url, tmp_path)
        with pytest.raises(TrainingError, match=r"disagree by .* the responses are not this"):
            train(tmp_path, roles, sampler)
    after = torch.cat([p.detach().flatten() for p in roles.policy.parameters()])
    assert torch.equal(before, after)


def _sampled(url, tmp_path):
    sampler = by_server(Role(tiny_llama(seed=1)), url, tmp_path)
    sampler.update_weights()
    rollout = sampler.sample(PROMPTS * 3, seed=0)
    y = rollout.sequences
    numbers = (y.response_ids, y.mask, rollout.logprobs, rollout.ended)
    return [x.tolist() for x in numbers]


@pytest.mark.slow
def test_several_processes_ask_for_a_share_each_and_get_the_same_rollout(tmp_path):
    state = StandIn(tiny_llama(seed=0))
    with serving(state) as url:
        (alone,) = together(1, _sampled, url, tmp_path)
        one, other = together(2, _sampled, url, tmp_path)
    assert len(state.requests) == 2 * len(PROMPTS) * 3
    for found in (one, other):
        assert found[:2] == alone[:2]
        assert found[3] == alone[3]
        torch.testing.assert_close(torch.tensor(found[2]), torch.tensor(alone[2]))


def _handed_over(folder, url):
    """What a policy in pieces is, on a server that it was handed to."""
    _, sft = start_frozen(model_config(folder, {"shard": True}), folder / "sft", 0)
    policy = sft.successor()
    by_server(policy, url, folder).update_weights()
    weights = policy.whole_weights()
    return [as_numpy(x) for x in weights.values()]


def test_a_policy_in_pieces_is_handed_over_whole(tmp_path):
    """The first process alone speaks with the server; all of them gather."""
    write_models(tmp_path)
    state = StandIn(load_model(str(tmp_path / "base")))
    with serving(state) as url:
        first, other = together(2, _handed_over, tmp_path, url)
    assert other == []
    received = [x.numpy() for x in state.model.state_dict().values()]
    assert all(map(np.array_equal, first, received))
    assert len(first) == len(received)


# --- a run ----------------------------------------------------------------------------------------


def recipe(folder, url, **rollout):
    settings = {"engine": "vllm", "url": url, "weight_dtype": "float32", "patience": 2.0}
    return write_recipe(folder, rollout={**settings, **rollout}, ppo={"steps": 3})


@pytest.fixture(scope="module")
def miniature():
    return load_model(str(BASE))


@pytest.mark.slow
def test_a_run_that_loses_its_server_goes_on_with_another_as_if_nothing_had_been(
    miniature, tmp_path
):
    with serving(StandIn(miniature)) as url:
        done = srppo_command("run", recipe(tmp_path / "whole", url))
        assert done.code == 0, done.err
    count, state = itertools.count(), StandIn(miniature)

    def out_of_order(path, answer):
        if path == "/v1/completions" and next(count) > 12:  # in the second step
            raise HTTPException(400, "out of order")
        return answer

    state.spoil = out_of_order
    with serving(state) as url:
        broken = srppo_command("run", path := recipe(tmp_path / "broken", url))
    assert broken.code == 2
    assert url in broken.err
    assert "out of order" in broken.err
    assert "kept at step 1" in broken.err
    with serving(StandIn(miniature)) as url:
        done = srppo_command("run", path, f"rollout.url={url}")
        assert done.code == 0, done.err
    whole, resumed = (tmp_path / n / "run" for n in ("whole", "broken"))
    assert timeless(resumed / "metrics/ppo.jsonl") == timeless(whole / "metrics/ppo.jsonl")
    assert not (whole / "rollout-weights").exists()
    assert not (whole / "bad").exists()


@pytest.mark.slow
def test_an_adapters_run(miniature, tmp_path):
    state = StandIn(miniature)
    with serving(state) as url:
        path = recipe(tmp_path, url)
        done = srppo_command("run", path, "model.lora.rank=4", "ppo.learning_rate=0.01")
        assert done.code == 0, done.err
    lines = json_lines(tmp_path / "run/metrics/ppo.jsonl")
    assert all(line["sampler_logprob_diff"] < 1e-4 for line in lines)
    assert lines[-1]["kl_sft"] != 0
    assert "/collective_rpc" not in state.sequence


def test_an_absent_server_is_told_before_stage_1(tmp_path):
    done = srppo_command("run", recipe(tmp_path, "http://127.0.0.1:9", patience=0.1))
    assert done.code == 2
    assert "http://127.0.0.1:9 does not answer" in done.err
    assert json.loads((tmp_path / "run/run.json").read_text())["stages"] == {}
