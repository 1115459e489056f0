"""Stage 2: rewards, metrics and the loop around the update."""

import json
import math
from dataclasses import replace

import pytest
import torch

import tiny
from enumerable import EOS, LENGTH, PROMPTS, fine_tuned, tiny_llama
from srppo.config import PPOConfig
from srppo.errors import ConfigError, DataError, TrainingError
from srppo.models.batching import Sequences
from srppo.models.roles import Roles
from srppo.models.value_head import ValueHead
from srppo.progress import Reporter
from srppo.rollout.hf import HFSampler
from srppo.rollout.sampler import Rollout, Sampler
from srppo.train.metrics import MetricsLog
from srppo.train.ppo import (
    Scores,
    advantages_of,
    correlation,
    describe,
    prompt_batch,
    rewards_of,
    score_rollout,
    train_ppo,
    values_under,
)

NAN, LN2 = math.nan, math.log(2)

# --- two responses by hand: the first ended, the second was cut off; padding holds NaN ------------


@pytest.fixture
def rollout():
    y = Sequences.of([[1], [2]], [[5, EOS], [5, 6, 7]])
    return Rollout(
        y, torch.tensor([[-1.5, -2.4, NAN], [-1.0, -0.5, -1.1]]), torch.tensor([True, False])
    )


SCORES = Scores(
    policy=torch.tensor([[-1.5, -2.5, NAN], [-1.0, -0.5, -1.0]]),
    sft=torch.tensor([[-1.0, -2.0, NAN], [-0.5, -1.0, -3.0]]),
    base=torch.tensor([[-2.0, -1.5, NAN], [-1.0, -4.0, -1.0]]),
    value_units=None,
    margins=torch.tensor([[0.0, -0.5, NAN], [-0.1, -LN2 - 2.0, -LN2 - 0.5]]),
)
# log sft/base      1.0  -0.5           0.5   3.0  -2.0     sums 0.5, 1.5
# log policy/sft   -0.5  -0.5          -0.5   0.5   2.0     sums -1, 2
# log policy/base   0.5  -1.0           0.0   3.5   0.0     sums -0.5, 3.5
BETA = 0.5
REWARDS = {
    "credit at EOS": ({}, [[0.25, 0.25 + 0.5, 0], [0.25, -0.25, -1.0 + 1.5]]),
    "credit by token": ({"credit": "token"}, [[1.25, -0.25, 0], [0.75, 2.75, -3.0]]),
    "KL to base": (
        {"kl_ref": "base"},
        [[-0.25, 0.5 + 0.5, 0], [0.0, -1.75, 1.5]],
    ),
    "mean per token": ({"reward": "mean"}, [[0.25, 0.25 + 0.25, 0], [0.25, -0.25, -1.0 + 0.5]]),
    "tokens held within 1 nat": (
        {"token_clip": 1.0, "credit": "token"},
        [[1.25, -0.25, 0], [0.75, 0.75, -2.0]],
    ),
    "implausible tokens": (
        {"plausibility": 0.5, "credit": "token"},
        [[1.25, -0.25, 0], [0.75, -2.25, -1.5]],
    ),
    "penalty where there is no EOS": (
        {"missing_eos_penalty": 2.0},
        [[0.25, 0.75, 0], [0.25, -0.25, 0.5 - 2.0]],
    ),
}


@pytest.mark.parametrize("kind", list(REWARDS))
def test_rewards_by_hand(kind, rollout):
    settings, expected = REWARDS[kind]
    rewards = rewards_of(rollout, SCORES, PPOConfig(kl_coef=BETA, **settings))
    torch.testing.assert_close(rewards, torch.tensor(expected))


def test_metrics_by_hand(rollout):
    """J = mean(0.5 + 0.5 * 1, 1.5 - 0.5 * 2)."""
    found = describe(rollout, SCORES, torch.zeros(2, 3), torch.ones(2, 3), PPOConfig(kl_coef=BETA))
    expected = {
        "reward": 1.0,
        "reward_std": 0.5,
        "objective": 0.75,
        "kl_ref": 0.5,
        "kl_sft": 0.5,
        "kl_base": 1.5,
        "response_length": 2.5,
        "eos_rate": 0.5,
        "entropy": (1.5 + 2.5 + 1.0 + 0.5 + 1.0) / 5,
        "length_reward_corr": 1.0,
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-6)
    assert "saturated_fraction" not in found


def test_the_objective_uses_the_reference_reward_and_clip_of_the_recipe(rollout):
    def objective(**settings):
        config = PPOConfig(kl_coef=BETA, **settings)
        return describe(rollout, SCORES, torch.zeros(2, 3), torch.ones(2, 3), config)

    assert objective(kl_ref="base")["objective"] == pytest.approx((0.5 + 0.25 + 1.5 - 1.75) / 2)
    assert objective(kl_ref="base")["kl_ref"] == pytest.approx(1.5)
    assert objective(reward="mean")["objective"] == pytest.approx((0.25 + 0.5 + 0.5 - 1.0) / 2)
    clipped = objective(token_clip=1.0)
    assert clipped["objective"] == pytest.approx((0.5 + 0.5 + 0.5 - 1.0) / 2)
    assert clipped["saturated_fraction"] == pytest.approx(2 / 5)
    plausible = objective(plausibility=0.5)
    assert plausible["objective"] == pytest.approx((0.5 + 0.5 - 2.0 - 1.0) / 2)
    assert plausible["implausible_fraction"] == pytest.approx(2 / 5)


def test_the_rewards_of_a_response_sum_to_its_share_of_the_objective(rollout):
    """Wherever the credit goes, and without the penalty, which J does not contain."""
    for credit in ("eos", "token"):
        config = PPOConfig(kl_coef=BETA, credit=credit)
        found = describe(rollout, SCORES, torch.zeros(2, 3), torch.ones(2, 3), config)
        total = rewards_of(rollout, SCORES, config).sum(1)
        assert float(total.mean()) == pytest.approx(found["objective"])


def test_correlation_is_pearsons_and_zero_where_nothing_varies():
    torch.manual_seed(0)
    a, b = torch.randn(2, 50)
    expected = torch.corrcoef(torch.stack([a, b]))[0, 1]
    torch.testing.assert_close(correlation(a, b), expected)
    assert correlation(a, torch.ones(50)) == 0


# --- values and advantages ------------------------------------------------------------------------


def test_the_first_rollout_calibrates_the_critic_to_its_returns(rollout):
    """Returns-to-go by hand; gae_lambda does not enter. Later rollouts change nothing."""
    critic = ValueHead(tiny.model())
    scores = replace(SCORES, value_units=torch.zeros(2, 3))
    rewards = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 6.0]])
    config = PPOConfig(gae_lambda=0.3)
    values = values_under(critic, rollout, scores, rewards, config)
    returns = torch.tensor([3.0, 2.0, 6.0, 6.0, 6.0])
    torch.testing.assert_close(critic.shift, returns.mean())
    torch.testing.assert_close(critic.scale, returns.std(correction=0))
    torch.testing.assert_close(values, torch.where(rollout.sequences.mask, returns.mean(), 0.0))
    values_under(critic, rollout, scores, rewards + 100, config)
    torch.testing.assert_close(critic.shift, returns.mean())


def test_without_a_critic_values_are_zero(rollout):
    rewards = torch.ones(2, 3)
    assert torch.equal(values_under(None, rollout, SCORES, rewards, PPOConfig()), torch.zeros(2, 3))


def test_rloo_compares_responses_to_the_same_prompt(rollout):
    """Two responses: each advantage is the difference of the two returns, at every token."""
    config = PPOConfig(estimator="rloo", responses_per_prompt=2, whiten_advantages=False)
    rewards = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 6.0]])
    advantages, _ = advantages_of(rewards, torch.zeros(2, 3), SCORES, rollout, config)
    assert advantages.tolist() == [[-4.0, -4.0, 0.0], [4.0, 4.0, 4.0]]


def test_ppo_with_lambda_1_is_the_return_to_go_minus_the_value(rollout):
    config = PPOConfig(whiten_advantages=False, gae_lambda=1.0)
    rewards = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 6.0]])
    values = torch.tensor([[0.5, 1.0, 0.0], [2.0, 2.0, 2.0]])
    advantages, returns = advantages_of(rewards, values, SCORES, rollout, config)
    torch.testing.assert_close(returns, torch.tensor([[3.0, 2.0, 0.0], [7.0, 7.0, 6.0]]))
    torch.testing.assert_close(advantages, torch.where(rollout.sequences.mask, returns - values, 0))


@pytest.mark.parametrize("estimator", ["ppo", "rloo"])
def test_whitening_is_over_all_tokens_of_the_rollout(rollout, estimator):
    config = PPOConfig(estimator=estimator, responses_per_prompt=2)
    rewards = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 6.0]])
    advantages, _ = advantages_of(rewards, torch.zeros(2, 3), SCORES, rollout, config)
    tokens = advantages[rollout.sequences.mask]
    assert float(tokens.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(tokens.std(correction=0)) == pytest.approx(1.0, abs=1e-5)
    assert (advantages[~rollout.sequences.mask] == 0).all()


# --- prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3, 7, 10, 25])
def test_each_pass_over_the_prompts_takes_each_once(n):
    prompts = [[i] for i in range(10)]
    steps = math.ceil(30 / n)
    drawn = [p[0] for s in range(1, steps + 1) for p in prompt_batch(prompts, n, s, seed=3)]
    assert len(drawn) == steps * n
    passes = [drawn[k : k + 10] for k in range(0, 30, 10)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert passes[0] != passes[1]  # shuffled anew
    assert passes[0] != sorted(passes[0])


def test_the_order_of_prompts_is_the_seeds():
    prompts = [[i] for i in range(50)]
    assert prompt_batch(prompts, 20, 2, seed=1) == prompt_batch(prompts, 20, 2, seed=1)
    assert prompt_batch(prompts, 20, 2, seed=1) != prompt_batch(prompts, 20, 2, seed=2)


# --- the loop -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    base = tiny_llama(seed=0)
    return base, fine_tuned(base, seed=0)


class Recording(Sampler):
    """A sampler that remembers what it was asked for, and the policy's weights at that time."""

    def __init__(self, policy):
        self.policy = policy
        self.inner = HFSampler(policy, eos_token_id=EOS, max_new_tokens=LENGTH)
        self.prompts, self.seeds, self.weights = [], [], []

    def sample(self, prompts, seed, temperature=1.0):
        self.prompts.append(prompts)
        self.seeds.append(seed)
        self.weights.append(weights_of(self.policy.model))
        return self.inner.sample(prompts, seed, temperature)


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


@pytest.fixture
def train(pair, tmp_path):
    """Runs the loop on the enumerable problem; returns (stopped, roles, sampler, log lines)."""

    def run(prompts=PROMPTS, seed=0, evaluate=None, evaluate_every=None, **settings):
        config = PPOConfig(
            **{
                "steps": 3,
                "rollouts_per_step": 16,
                "minibatch_size": 8,
                "learning_rate": 1e-3,
                "value_learning_rate": 1e-3,
                **settings,
            }
        )
        roles = Roles.begin(*pair, critic=config.estimator == "ppo")
        sampler = Recording(roles.policy)
        with MetricsLog(tmp_path, "ppo") as log:
            stopped = train_ppo(
                roles,
                sampler,
                prompts,
                config,
                seed=seed,
                log=log,
                reporter=Reporter(quiet=True),
                evaluate=evaluate,
                evaluate_every=evaluate_every,
            )
        lines = [json.loads(x) for x in (tmp_path / "metrics/ppo.jsonl").read_text().splitlines()]
        return stopped, roles, sampler, lines

    return run


KEYS = {
    "step",
    "reward",
    "reward_std",
    "objective",
    "kl_ref",
    "kl_sft",
    "kl_base",
    "response_length",
    "eos_rate",
    "entropy",
    "length_reward_corr",
    "sampler_logprob_diff",
    "padding",
    "policy_loss",
    "clip_fraction",
    "update_kl",
    "grad_norm",
    "learning_rate",
    "time/rollout",
    "time/scoring",
    "time/update",
    "time/other",
    "time/tokens_per_second",
    "time/attainable_share",
}
VALUE_KEYS = {"value_explained_variance", "value_loss", "value_grad_norm"}


def test_every_step_leaves_one_line_with_every_metric(train):
    stopped, _, _, lines = train()
    assert stopped is None
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line.keys() == KEYS | VALUE_KEYS
        assert all(math.isfinite(value) for value in line.values())
        assert line["sampler_logprob_diff"] < 1e-5
        assert 1 <= line["response_length"] <= LENGTH


def test_the_first_step_starts_at_sft(train):
    """KL to sft is exactly zero there, so J is the reward and KL to base the reward itself."""
    first = train()[3][0]
    assert first["kl_sft"] == 0
    assert first["objective"] == first["reward"] == pytest.approx(first["kl_base"])
    assert abs(first["reward"]) > 0.05


def test_rloo_has_no_critic_and_no_value_metrics(train):
    stopped, roles, sampler, lines = train(
        estimator="rloo", responses_per_prompt=4, value_warmup_steps=2
    )
    assert stopped is None
    assert roles.critic is None
    assert [line["step"] for line in lines] == [1, 2, 3]  # nothing to warm up
    assert lines[0].keys() == KEYS
    # four consecutive responses answer one prompt
    for batch in sampler.prompts:
        assert len(batch) == 16
        assert all(batch[i] == batch[4 * (i // 4)] for i in range(16))


def test_warm_up_steps_come_on_top_and_do_not_move_the_policy(train):
    _, roles, sampler, lines = train(value_warmup_steps=2, steps=2)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    start = weights_of(roles.sft.model)
    assert [torch.equal(w, start) for w in sampler.weights] == [True, True, True, False]
    assert "grad_norm" not in lines[0]
    assert "grad_norm" in lines[2]
    assert lines[0]["value_grad_norm"] > 0


def test_a_schedule_decays_over_the_policys_steps_only(train):
    _, _, _, lines = train(value_warmup_steps=2, steps=4, lr_schedule="linear")
    rates = [line["learning_rate"] / 1e-3 for line in lines]
    assert rates == pytest.approx([1, 1, 1, 0.75, 0.5, 0.25])


def test_steps_default_to_one_pass_over_the_prompts(train):
    _, _, sampler, lines = train(prompts=[[1 + i % 4] for i in range(36)], steps=None)
    assert len(lines) == 3  # 36 prompts, 16 a step
    assert [len(batch) for batch in sampler.prompts] == [16, 16, 16]


def test_max_kl_stops_training_and_says_so(train):
    stopped, roles, sampler, lines = train(steps=9, learning_rate=0.05, max_kl=0.05)
    n = len(lines)
    assert 1 < n < 9
    assert f"step {n}" in stopped
    assert "ppo.max_kl=0.05" in stopped
    assert lines[-1]["kl_ref"] > 0.05
    assert all(line["kl_ref"] <= 0.05 for line in lines[:-1])
    assert torch.equal(weights_of(roles.policy.model), sampler.weights[-1])  # kept as it was


def test_max_kl_measures_the_distance_to_the_reference_of_the_recipe(train):
    """The SFT model itself is already too far from base: a run that trains nothing is refused."""
    with pytest.raises(ConfigError, match=r"KL to base .*nothing would be trained.*max_kl"):
        train(kl_ref="base", max_kl=0.01)


def test_a_policy_that_broke_stops_the_run(pair, tmp_path):
    roles = Roles.begin(*pair, critic=False)
    fixed = replace(Recording(roles.sft).sample(PROMPTS, seed=0), exact=False)
    roles.policy.model.lm_head.weight.data[:] = torch.nan

    class Fixed(Sampler):
        def sample(self, prompts, seed, temperature=1.0):
            return fixed

    config = PPOConfig(
        estimator="rloo", responses_per_prompt=2, rollouts_per_step=4, minibatch_size=4, steps=5
    )
    with MetricsLog(tmp_path, "ppo") as log, pytest.raises(TrainingError, match="log pi_theta"):
        train_ppo(roles, Fixed(), PROMPTS, config, seed=0, log=log, reporter=Reporter(quiet=True))


def test_evaluation_comes_every_so_many_steps_and_at_the_end(train):
    calls = []

    def evaluate():
        calls.append(1)
        return {"eval/accuracy/all": 0.25 * len(calls)}

    _, _, _, lines = train(steps=5, evaluate=evaluate, evaluate_every=2)
    found = {x["step"]: x["eval/accuracy/all"] for x in lines if "eval/accuracy/all" in x}
    assert found == {2: 0.25, 4: 0.5, 5: 0.75}


def test_equal_seeds_give_equal_runs_and_others_do_not(train):
    def run(seed):
        _, roles, _, lines = train(seed=seed)
        timeless = [{k: v for k, v in x.items() if not k.startswith("time/")} for x in lines]
        return weights_of(roles.policy.model), timeless

    (one, lines), (two, same_lines), (other, other_lines) = run(5), run(5), run(6)
    assert torch.equal(one, two)
    assert lines == same_lines
    assert not torch.equal(one, other)
    assert lines != other_lines


def test_every_step_samples_with_a_seed_of_its_own_also_for_large_seeds(train):
    """A date as seed used to overflow the generator."""
    _, _, sampler, _ = train(seed=20_251_023)
    _, _, largest, _ = train(seed=2**32 - 1)
    assert len({*sampler.seeds, *largest.seeds}) == 6


def test_no_prompts_is_an_error_with_a_cure(train):
    with pytest.raises(DataError, match=r"no prompts.*Set data\.prompts"):
        train(prompts=[])


def test_scores_are_those_of_the_three_models(pair):
    roles = Roles.begin(*pair, critic=False)
    with torch.no_grad():
        roles.policy.model.lm_head.weight *= 1.5
    rollout = Recording(roles.policy).sample(PROMPTS, seed=0)
    scores = score_rollout(roles, rollout, PPOConfig())
    for name in ("policy", "sft", "base"):
        prompt, response = tiny.row(rollout.sequences, 1)
        expected = tiny.plain_logprobs(getattr(roles, name).model, prompt, response)
        torch.testing.assert_close(
            getattr(scores, name)[1, : len(response)], expected, atol=1e-5, rtol=0
        )
