"""Stage 2: PPO on the reward that the two models already contain. `train_ppo` is the algorithm."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from srppo.algo.advantage import gae, leave_one_out
from srppo.algo.all_action import all_action_advantages
from srppo.algo.kl import k1, k3
from srppo.algo.loss import explained_variance
from srppo.algo.masking import masked_mean, masked_sum, whiten
from srppo.algo.mismatch import importance_weights
from srppo.algo.reward import last_token, token_log_ratios, token_rewards
from srppo.config import PPOConfig
from srppo.errors import ConfigError, DataError
from srppo.models.memory import Budget
from srppo.models.roles import Roles
from srppo.models.scoring import score, score_with_margins, score_with_values
from srppo.models.value_head import ValueHead
from srppo.progress import Reporter
from srppo.rollout.sampler import Rollout, Sampler
from srppo.train.all_action import FrozenStates, frozen_states, score_all_actions
from srppo.train.health import ailment, not_finite
from srppo.train.metrics import MetricsLog
from srppo.train.pace import Pace, Stopwatch
from srppo.train.reward import bounds_of
from srppo.train.state import Tree
from srppo.train.steps import Keeper, Steps
from srppo.train.update import Experience, Metrics, Optimizers, Trained, generator, update

Evaluate = Callable[[], Metrics]
"""Measures the policy as it is now, without touching its state or the run's random numbers."""


@dataclass(frozen=True)
class Scores:
    """What the models say about one rollout; each (N, T) float32, zero at padding."""

    policy: Tensor
    """log pi_theta before this step's update, nats."""
    sft: Tensor
    """log pi_sft, nats: serves the reward and, with kl_ref=sft, the KL term."""
    base: Tensor
    """log pi_base, nats."""
    value_units: Tensor | None = None
    """What the critic says, in its own units; None without a critic."""
    margins: Tensor | None = None
    """log pi_sft(y_t) - max_a log pi_sft(a), nats; None where the reward does not need them."""
    gains: Tensor | None = None
    """All-action: what each state earns in the mean over the policy's next token, nats."""
    frozen: FrozenStates | None = None
    """All-action: what the update makes both frozen distributions of again."""


def train_ppo(
    roles: Roles,
    sampler: Sampler,
    prompts: list[list[int]],
    config: PPOConfig,
    *,
    seed: int,
    log: MetricsLog,
    reporter: Reporter,
    evaluate: Evaluate | None = None,
    evaluate_every: int | None = None,
    keeper: Keeper | None = None,
    budget: Budget | None = None,
    importance_cap: float | None = None,
    title: str = "PPO",
) -> str | None:
    """Maximise E_x E_{y~pi_theta}[ r(x,y) - kl_coef log(pi_theta/pi_ref) ]; trains roles.policy.

    Args:
        sampler: samples from `roles.policy` as it was when its weights were last updated.
        prompts: token ids; drawn without replacement, shuffled anew when used up.
        evaluate: called after the last and after every `evaluate_every`-th step.
        keeper: of checkpoints; training goes on from the last one.
        budget: tokens per pass, where the sampler shares it; None: one of the recipe's.
        importance_cap: bound of the weights that undo how the sampler's arithmetic differs from
            the trainer's; None: no weights.

    Returns:
        Why training stopped early, or None.

    Raises:
        TrainingError: a step would teach nothing (`ailment`), or nothing fits into memory.

    Source: arXiv:2510.21090, stage 2; docs/math.md.
    """
    if not prompts:
        raise DataError("stage 2 has no prompts: nothing would be trained. Set data.prompts.")
    per_step = config.rollouts_per_step // config.responses_per_prompt
    steps = config.steps or math.ceil(len(prompts) / per_step)
    total = steps + (config.value_warmup_steps if roles.critic else 0)
    optimizers = Optimizers(roles, config)
    budget = budget or Budget(config.max_tokens_per_batch)
    pace, watch = Pace(roles, config), Stopwatch()
    with (
        Steps(keeper, Trained(roles, optimizers, budget), log) as place,
        reporter.bar(title, total, "steps", place.done) as advance,
    ):
        for step in range(place.done + 1, total + 1):
            warming_up = step <= total - steps
            optimizers.set_progress((step - 1 - (total - steps)) / steps)
            batch = prompt_batch(prompts, per_step, step, seed)
            batch = [x for x in batch for _ in range(config.responses_per_prompt)]

            with watch("rollout"):
                sampler.wake()
                sampler.update_weights()
                rollout = sampler.sample(batch, _seed(seed, "rollout", step))
                sampler.sleep()
            with watch("scoring"):
                scores = budget.fit(partial(score_rollout, roles, rollout, config))
                rewards = rewards_of(rollout, scores, config)
                values = values_under(roles.critic, rollout, scores, rewards, config)
                advantages, returns = advantages_of(rewards, values, scores, rollout, config)
                metrics = describe(rollout, scores, values, returns, config)
                if importance_cap:
                    weights = importance_weights(
                        scores.policy, rollout.logprobs, rollout.sequences.mask, importance_cap
                    )
                    advantages = advantages * weights
                    metrics |= describe_weights(weights, rollout, importance_cap)

            numbers = numbers_of(scores, rewards, advantages)
            skip = config.on_bad_numbers == "skip"
            if found := ailment(numbers, rollout, metrics):
                place.bad(step, found, batch_of(rollout, numbers), metrics, skip=skip)
                log.log(step, metrics)
                place.complete(step, metrics)
                advance(1)
                continue
            if metrics["kl_ref"] > config.max_kl:
                log.log(step, metrics)
                over = (
                    f"KL to {config.kl_ref} is {metrics['kl_ref']:.3g} nats a response at step "
                    f"{step}, above ppo.max_kl={config.max_kl:g}"
                )
                if step == 1:
                    raise ConfigError(
                        f"{over}, before the policy has moved: nothing would be trained. "
                        "Raise ppo.max_kl, or look at the SFT model."
                    )
                return f"{over}: stopped. The policy is kept as that step found it."
            experience = Experience(
                rollout, scores.policy, values, advantages, returns, scores.frozen
            )
            shuffle = generator(_seed(seed, "minibatches", step))
            place.begin_update()
            with watch("update"):
                metrics |= update(
                    roles,
                    experience,
                    optimizers,
                    config,
                    shuffle,
                    move_policy=not warming_up,
                    budget=budget,
                )
            if found := not_finite(metrics):
                place.bad(step, found, batch_of(rollout, numbers), metrics, skip=skip)

            if evaluate and (step == total or (evaluate_every and step % evaluate_every == 0)):
                with watch("evaluation"):
                    metrics |= evaluate()
            metrics |= pace.of(rollout, watch.lap())
            log.log(step, metrics)
            reporter.line(headline(title, step, total, metrics))
            advance(1)
            place.complete(step, metrics)
    return None


def prompt_batch(prompts: list[list[int]], n: int, step: int, seed: int) -> list[list[int]]:
    """x ~ D: the `step`-th n prompts of an endless sequence of shuffled passes."""
    chosen = []
    for i in range((step - 1) * n, step * n):
        epoch, place = divmod(i, len(prompts))
        if place == 0 or i == (step - 1) * n:
            order = torch.randperm(len(prompts), generator=generator(_seed(seed, "data", epoch)))
        chosen.append(prompts[int(order[place])])
    return chosen


def score_rollout(
    roles: Roles, rollout: Rollout, config: PPOConfig, max_tokens: int | None = None
) -> Scores:
    """Two frozen passes (sft, base); the policy's own numbers are the sampler's, if it can tell.

    `max_tokens` per pass, padding included; None: the recipe's.
    """
    if max_tokens:
        config = config.model_copy(update={"max_tokens_per_batch": max_tokens})
    y, budget = rollout.sequences, config.max_tokens_per_batch
    if config.estimator == "all_action":
        frozen = frozen_states(roles, y, budget)
        policy, sft, base, margins, gains = score_all_actions(roles, y, frozen, config)
        return Scores(policy, sft, base, margins=margins, gains=gains, frozen=frozen)
    policy, units = rollout.logprobs, rollout.value_units
    if not rollout.exact or (roles.critic and units is None):
        policy, units = score_with_values(roles.policy, roles.critic, y, budget)
    base = score(roles.base, y, budget)
    if config.plausibility is None:
        return Scores(policy, score(roles.sft, y, budget), base, units)
    sft, margins = score_with_margins(roles.sft, y, budget)
    return Scores(policy, sft, base, units, margins)


def log_ratios_of(scores: Scores, mask: Tensor, config: PPOConfig) -> Tensor:
    """(N, T) nats, each token's part of the reward."""
    return token_log_ratios(scores.sft, scores.base, mask, bounds_of(config), scores.margins)


def rewards_of(rollout: Rollout, scores: Scores, config: PPOConfig) -> Tensor:
    """(N, T) nats: credit for log pi_sft - log pi_base, minus kl_coef log(pi_theta/pi_ref).

    All-action: each token its own, and the penalty is left to `advantages_of`.
    """
    mask = rollout.sequences.mask
    ratios = log_ratios_of(scores, mask, config)
    if config.reward == "mean":
        ratios = ratios / rollout.sequences.lengths[:, None]
    ref = scores.sft if config.kl_ref == "sft" else scores.base
    every_token = config.estimator == "all_action"
    credit = "token" if every_token else config.credit
    rewards = token_rewards(ratios, scores.policy, ref, mask, config.beta, credit)
    if config.missing_eos_penalty and not every_token:
        cut_off = (~rollout.ended).nonzero().squeeze(1)
        rewards[cut_off, last_token(mask)[cut_off]] -= config.missing_eos_penalty
    return rewards


def values_under(
    critic: ValueHead | None, rollout: Rollout, scores: Scores, rewards: Tensor, config: PPOConfig
) -> Tensor:
    """(N, T) nats, V of each prefix; zero without a critic. The first call calibrates it."""
    mask = rollout.sequences.mask
    if critic is None or scores.value_units is None:
        return torch.zeros_like(rewards)
    if not critic.calibrated:
        _, returns = gae(rewards, torch.zeros_like(rewards), mask, config.gamma, 1.0)
        critic.calibrate(returns, mask)
    return torch.where(mask, critic.in_nats(scores.value_units), 0.0)


def advantages_of(
    rewards: Tensor, values: Tensor, scores: Scores, rollout: Rollout, config: PPOConfig
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, both (N, T); whitening is over the whole rollout.

    All-action: not whitened, for they add up with what the loss knows exactly; no returns.
    """
    mask = rollout.sequences.mask
    if scores.gains is not None:
        advantages = all_action_advantages(
            scores.gains,
            rewards,
            mask,
            group_size=config.responses_per_prompt,
            share=config.sampled_share,
            gamma=config.gamma,
            terminal=-config.missing_eos_penalty * (~rollout.ended).float(),
        )
        return advantages, torch.zeros_like(rewards)
    if config.estimator == "rloo":
        whole = masked_sum(rewards, mask, dim=1)
        returns = torch.where(mask, whole[:, None], 0.0)
        advantages = leave_one_out(whole, config.responses_per_prompt)[:, None] * mask
    else:
        advantages, returns = gae(rewards, values, mask, config.gamma, config.gae_lambda)
    return (whiten(advantages, mask) if config.whiten_advantages else advantages), returns


def describe(
    rollout: Rollout, scores: Scores, values: Tensor, returns: Tensor, config: PPOConfig
) -> Metrics:
    """The step's metrics that need no update; docs/metrics.md defines each."""
    y, mask = rollout.sequences, rollout.sequences.mask
    reward = masked_sum(log_ratios_of(scores, mask, config), mask, 1)
    if config.reward == "mean":
        reward = reward / y.lengths
    kl_sft = masked_sum(k1(scores.policy, scores.sft), mask, 1)
    kl_base = masked_sum(k1(scores.policy, scores.base), mask, 1)
    kl_ref = kl_sft if config.kl_ref == "sft" else kl_base
    metrics = {
        "reward": reward.mean(),
        "reward_std": reward.std(correction=0),
        "objective": (reward - config.beta * kl_ref).mean(),
        "kl_ref": kl_ref.mean(),
        "kl_sft": kl_sft.mean(),
        "kl_base": kl_base.mean(),
        "response_length": y.lengths.float().mean(),
        "eos_rate": rollout.ended.float().mean(),
        "entropy": -masked_mean(scores.policy, mask),
        "length_reward_corr": correlation(y.lengths.float(), reward),
    }
    if config.token_clip is not None:
        bounded = (scores.sft - scores.base).abs() > config.token_clip
        metrics["saturated_fraction"] = masked_mean(bounded.float(), mask)
    if config.plausibility is not None:
        assert scores.margins is not None
        below = scores.margins < math.log(config.plausibility)
        metrics["implausible_fraction"] = masked_mean(below.float(), mask)
    if not rollout.exact:
        off = torch.where(mask, scores.policy - rollout.logprobs, 0.0).abs()
        metrics["sampler_logprob_diff"] = masked_mean(off, mask)
        metrics["sampler_logprob_max"] = off.max()
        metrics["sampler_kl"] = masked_mean(k3(rollout.logprobs, scores.policy), mask)
    if config.estimator == "ppo":
        metrics["value_explained_variance"] = explained_variance(values, returns, mask)
    return {key: float(value) for key, value in metrics.items()}


def describe_weights(weights: Tensor, rollout: Rollout, cap: float) -> Metrics:
    """What the weights of `importance_cap` do; docs/metrics.md."""
    mask = rollout.sequences.mask
    return {
        "importance_weight": float(masked_mean(weights, mask)),
        "importance_capped": float(masked_mean((weights >= cap).float(), mask)),
    }


def numbers_of(scores: Scores, rewards: Tensor, advantages: Tensor) -> dict[str, Tensor]:
    """(N, T) each: what the update is made of, by name."""
    return {
        "log pi_theta": scores.policy,
        "log pi_sft": scores.sft,
        "log pi_base": scores.base,
        "reward": rewards,
        "advantage": advantages,
    }


def batch_of(rollout: Rollout, numbers: dict[str, Tensor]) -> Tree:
    """The step's batch as it is kept for inspection."""
    y = rollout.sequences
    return {"prompt_ids": y.prompt_ids, "response_ids": y.response_ids, "mask": y.mask, **numbers}


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of two (N,) tensors; 0 where one of them does not vary."""
    a, b = a - a.mean(), b - b.mean()
    scale = a.norm() * b.norm()
    return (a * b).sum() / scale if scale > 0 else torch.tensor(0.0)


def headline(title: str, step: int, total: int, metrics: Metrics) -> str:
    """One line per step."""
    parts = [
        f"{title} step {step}/{total}",
        f"reward {metrics['reward']:.2f}",
        f"J {metrics['objective']:.2f}",
        f"KL(sft) {metrics['kl_sft']:.2f} nats",
        f"length {metrics['response_length']:.1f}",
        f"EOS {metrics['eos_rate']:.0%}",
        f"{metrics['time/tokens_per_second']:.0f} tokens/s",
    ]
    evaluated = [key.split("/", 2) for key in metrics if key.startswith("eval/")]
    for _, name, group in evaluated:
        if name == evaluated[0][1]:  # the first score; the others are in the log
            parts.append(f"{name} {group} {metrics[f'eval/{name}/{group}']:.2f}")
    return "  ".join(parts)


def _seed(seed: int, purpose: str, index: int) -> int:
    """Independent streams for each purpose and step, from the run's seed alone."""
    streams = {"data": 1, "rollout": 2, "minibatches": 3}
    return ((seed * 1_000_003 + streams[purpose]) * 1_000_003 + index) % 2**63
