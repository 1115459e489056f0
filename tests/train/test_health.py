"""Steps that would teach nothing are noticed, kept for inspection, and stopped at or left out."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import tiny
from enumerable import EOS, LENGTH, PROMPTS, fine_tuned, tiny_llama
from srppo.config import PPOConfig, SFTConfig
from srppo.config_checkpoint import CheckpointConfig
from srppo.data.chat import Example
from srppo.errors import TrainingError
from srppo.models.batching import Sequences
from srppo.models.roles import Roles
from srppo.progress import Reporter
from srppo.rollout.hf import HFSampler
from srppo.rollout.sampler import Rollout, Sampler
from srppo.train import ppo
from srppo.train.health import ailment, not_finite
from srppo.train.metrics import MetricsLog
from srppo.train.ppo import train_ppo
from srppo.train.sft import train_sft
from srppo.train.steps import PATIENCE, Keeper

FINE = {"entropy": 1.0, "reward": 2.0, "reward_std": 0.5}


def rollout_of(n, ended):
    y = Sequences.of([[1]] * n, [[2, 3], [4]] * (n // 2))
    return Rollout(y, torch.zeros(y.mask.shape), torch.tensor(ended))


def found(n=16, ended=None, numbers=None, **metrics):
    rollout = rollout_of(n, ended or [True] * n)
    ill = ailment(numbers or {}, rollout, {**FINE, **metrics})
    return ill and ill.reason


# --- what is noticed ------------------------------------------------------------------------------


def test_a_step_like_any_other_is_not_ill():
    numbers = {"reward": torch.zeros(16, 2)}
    numbers["reward"][1::2, 1] = math.nan  # padding may hold anything
    assert found(numbers=numbers) is None
    assert found(ended=[False] * 15 + [True]) is None
    assert found(entropy=0.01, reward_std=1e-3) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_at_a_response_token(bad):
    numbers = {"log pi_sft": torch.zeros(16, 2), "reward": torch.zeros(16, 2)}
    numbers["reward"][2, 1] = bad
    assert found(numbers=numbers) == "reward is not a finite number at 1 of 24 response tokens"


@pytest.mark.parametrize(
    ("ill", "words"),
    [
        ({"ended": [False] * 16}, "all 16 responses were cut off at 2 tokens"),
        ({"entropy": 1e-6}, "entropy has collapsed"),
        ({"reward_std": 0.0}, "the reward of all 16 responses is 2 nats"),
        ({"reward_std": 1e-5, "reward": -100.0}, "the reward of all 16 responses is -100 nats"),
    ],
)
def test_rollouts_that_say_nothing(ill, words):
    assert words in found(**ill)


@pytest.mark.parametrize(
    ("ill", "cure"),
    [
        ({"ended": [False] * 16}, "sft.epochs"),
        ({"ended": [False] * 16}, "ppo.missing_eos_penalty"),
        ({"entropy": 1e-6}, "Raise ppo.kl_coef"),
        ({"reward_std": 0.0}, "train SFT for longer"),
    ],
)
def test_what_helps_is_what_helps_against_that(ill, cure):
    told = {"ended": [True] * 16, **ill}
    assert cure in ailment({}, rollout_of(16, told.pop("ended")), {**FINE, **told}).cure


def test_of_few_responses_that_may_be_chance():
    assert found(n=8, ended=[False] * 8, reward_std=0.0, entropy=0.0) is None


def test_gradients():
    assert not_finite({"grad_norm": 3.0, "value_grad_norm": 0.0}) is None
    assert not_finite({"reward": math.nan}) is None  # of no gradient
    assert "grad_norm is nan" in not_finite({"grad_norm": math.nan}).reason
    assert "value_grad_norm is inf" in not_finite({"value_grad_norm": math.inf}).reason
    assert not_finite({"sampler_logprob_diff": 0.01}) is None
    assert "disagree by 0.7" in not_finite({"sampler_logprob_diff": 0.7}).reason
    assert "policy_loss is nan" in not_finite({"policy_loss": math.nan, "grad_norm": 1.0}).reason


# --- what becomes of them -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    base = tiny_llama(seed=0)
    return base, fine_tuned(base, seed=0)


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


class Spoiled(Sampler):
    """A sampler that changes the rollouts of some steps; notes the policy's weights before each."""

    def __init__(self, policy, spoil, steps):
        self.policy, self.spoil, self.steps = policy, spoil, steps
        self.inner = HFSampler(policy, eos_token_id=EOS, max_new_tokens=LENGTH)
        self.weights = []

    def sample(self, prompts, seed, temperature=1.0):
        self.weights.append(weights_of(self.policy.model))
        rollout = self.inner.sample(prompts, seed, temperature)
        return self.spoil(rollout) if len(self.weights) in self.steps else rollout


def cut_off(rollout):
    return replace(rollout, ended=torch.zeros_like(rollout.ended))


def no_number(rollout):
    logprobs = rollout.logprobs.clone()
    logprobs[3, 0] = math.nan
    return replace(rollout, logprobs=logprobs)


def certain(rollout):
    return replace(rollout, logprobs=torch.zeros_like(rollout.logprobs))


def alike(rollout):
    """One response for all: one reward."""
    y = rollout.sequences
    n = len(y)
    same = Sequences.of([[1]] * n, [[2, 3, EOS]] * n)
    return Rollout(same, rollout.logprobs[:1, :1].expand(n, 3) - 1, rollout.ended, exact=True)


@pytest.fixture
def train(pair, tmp_path):
    """Runs the loop; returns the sampler, the log's lines, and how it ended."""

    def run(spoil, steps, total=4, spoil_gradient_of=(), **settings):
        config = PPOConfig(
            **{
                "steps": total,
                "rollouts_per_step": 16,
                "minibatch_size": 8,
                "estimator": "rloo",
                "responses_per_prompt": 2,
                "learning_rate": 1e-3,
                **settings,
            }
        )
        roles = Roles.begin(*pair, critic=False)
        sampler = Spoiled(roles.policy, spoil, steps)
        keeper = Keeper(tmp_path, "ppo", CheckpointConfig(every=1), Reporter(quiet=True))
        error = None
        with MetricsLog(tmp_path, "ppo") as log:
            try:
                train_ppo(
                    roles,
                    sampler,
                    PROMPTS,
                    config,
                    seed=0,
                    log=log,
                    reporter=Reporter(quiet=True),
                    keeper=keeper,
                )
            except TrainingError as e:
                error = str(e)
        sampler.weights.append(weights_of(roles.policy.model))
        lines = [json.loads(x) for x in (tmp_path / "metrics/ppo.jsonl").read_text().splitlines()]
        return sampler, lines, error

    return run


ILL = {
    "no number": (no_number, "log pi_theta is not a finite number at 1"),
    "cut off": (cut_off, "all 16 responses were cut off"),
    "certain": (certain, "entropy has collapsed"),
    "alike": (alike, "the reward of all 16 responses"),
}


@pytest.mark.parametrize("kind", ILL)
def test_stop_ends_the_stage_and_leaves_the_last_checkpoint(train, tmp_path, kind):
    spoil, words = ILL[kind]
    _, lines, error = train(spoil, steps=[3])
    assert "step 3: " in error
    assert words in error
    assert "ppo.on_bad_numbers=skip" in error
    assert [line["step"] for line in lines] == [1, 2]
    assert sorted(p.name for p in (tmp_path / "checkpoints/ppo").iterdir()) == [
        "step-000001",
        "step-000002",
    ]
    content = json.loads((tmp_path / "bad/ppo/step-000003.json").read_text())
    assert words in content["reason"]
    batch = load_file(tmp_path / "bad/ppo/step-000003.safetensors")
    assert batch["response_ids"].shape == batch["reward"].shape
    assert len(batch["mask"]) == len(content["batch"]["prompt_ids"]) == 16


@pytest.mark.parametrize("kind", ILL)
def test_skip_leaves_the_step_out_and_goes_on(train, tmp_path, kind):
    spoil, _ = ILL[kind]
    sampler, lines, error = train(spoil, steps=[2], on_bad_numbers="skip")
    assert error is None
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert ["grad_norm" in line for line in lines] == [True, False, True, True]
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(sampler.weights)]
    assert moved == [True, False, True, True]
    assert (tmp_path / "bad/ppo/step-000002.safetensors").is_file()


def test_skipping_for_ever_is_no_training(train):
    _, lines, error = train(cut_off, range(2, 99), total=20, on_bad_numbers="skip")
    assert f"step {1 + PATIENCE}: " in error
    assert "nor from those before" in error
    assert len(lines) == PATIENCE


def test_single_bad_steps_may_come_again_and_again(train):
    _, lines, error = train(cut_off, range(2, 99, 2), total=14, on_bad_numbers="skip")
    assert (len(lines), error) == (14, None)


@pytest.fixture
def second_gradient_is_nan(monkeypatch):
    """Of the second minibatch that there is."""
    real, calls = ppo.update.__globals__["accumulate"], []

    def spoiled(roles, *args, **kwargs):
        metrics = real(roles, *args, **kwargs)
        calls.append(1)
        if len(calls) == 2:
            roles.policy.parameters()[0].grad[:] = math.nan
        return metrics

    monkeypatch.setattr("srppo.train.update.accumulate", spoiled)


def test_a_gradient_that_is_no_number_stops_the_stage(train, tmp_path, second_gradient_is_nan):
    _, lines, error = train(cut_off, steps=[])
    assert "step 1: grad_norm is nan in a minibatch" in error
    assert lines == []
    assert not (tmp_path / "checkpoints").exists()


def test_or_its_minibatch_is_left_out(train, tmp_path, second_gradient_is_nan):
    sampler, lines, error = train(cut_off, steps=[], on_bad_numbers="skip")
    assert error is None
    assert [line["grad_norm"] is None for line in lines] == [True, False, False, False]
    assert all(weights.isfinite().all() for weights in sampler.weights)
    assert (tmp_path / "bad/ppo/step-000001.json").is_file()


@pytest.mark.parametrize("estimator", ["rloo", "all_action"])
def test_a_step_that_destroys_the_policy_stops_the_stage(train, tmp_path, estimator):
    """After the first minibatch its numbers are none; it rests then, and has no gradient."""
    pairs = {"estimator": estimator, "responses_per_prompt": 2}
    _, lines, error = train(cut_off, steps=[], learning_rate=1e30, **pairs)
    assert "step 1: policy_loss is nan in a minibatch" in error
    assert lines == []
    assert not (tmp_path / "checkpoints").exists()


def test_stage_1_stops_before_a_bad_gradient_moves_a_weight(tmp_path):
    model = tiny.model()
    y = tiny.sequences(n=8)
    examples = [Example(*tiny.row(y, i)) for i in range(8)]
    seen = []

    def spoil(gradient):
        seen.append(1)
        return gradient * (math.nan if len(seen) == 3 else 1.0)

    model.lm_head.weight.register_hook(spoil)
    keeper = Keeper(tmp_path, "sft", CheckpointConfig(every=1), Reporter(quiet=True))
    with (
        MetricsLog(tmp_path, "sft") as log,
        pytest.raises(TrainingError, match=r"step 3: the norm of its gradient is nan.*sft/step-0"),
    ):
        train_sft(
            model,
            tiny.tokenizer(),
            examples,
            SFTConfig(batch_size=2, micro_batch_size=2, epochs=2),
            seed=0,
            log=log,
            reporter=Reporter(quiet=True),
            keeper=keeper,
        )
    assert weights_of(model).isfinite().all()
    assert max((tmp_path / "checkpoints/sft").iterdir()).name == "step-000002"
    assert "inputs.0.labels" in load_file(tmp_path / "bad/sft/step-000003.safetensors")
