"""The update of one PPO step: shuffled minibatches, clipped losses, two optimizers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from transformers import PreTrainedModel

from srppo.algo.kl import k3
from srppo.algo.loss import clip_fraction, clipped_policy_loss, clipped_value_loss
from srppo.algo.masking import masked_mean, masked_sum
from srppo.config import PPOConfig
from srppo.models.batching import Batch, Sequences, microbatches
from srppo.models.roles import Roles
from srppo.models.scoring import batch_logprobs
from srppo.models.value_head import ValueModel

Metrics = dict[str, float]


@dataclass(frozen=True)
class Experience:
    """One rollout with all that an update needs; tensors are (N, T), zero at padding."""

    sequences: Sequences
    logprobs: Tensor
    """log pi_theta before the update, nats: the ratio's denominator."""
    values: Tensor
    """V before the update, nats."""
    advantages: Tensor
    returns: Tensor
    """What the critic learns, nats."""


class Optimizers:
    """AdamW for the policy and one for the critic, with a common schedule."""

    def __init__(self, roles: Roles, config: PPOConfig) -> None:
        self.schedule = config.lr_schedule
        self.max_grad_norm = config.max_grad_norm
        self.policy = AdamW(roles.policy.parameters(), config.learning_rate, weight_decay=0.0)
        self.critic: AdamW | None = None
        if roles.critic:
            rate = config.value_learning_rate
            self.critic = AdamW(roles.critic.parameters(), rate, weight_decay=0.0)
        self.peaks = [o.param_groups[0]["lr"] for o in self.all]

    @property
    def all(self) -> list[AdamW]:
        """Those there are."""
        return [self.policy] if self.critic is None else [self.policy, self.critic]

    def set_progress(self, done: float) -> None:
        """`done`: the share of the policy's steps that lies behind; negative during warm-up."""
        done = max(0.0, done)
        factor = {
            "constant": 1.0,
            "linear": 1.0 - done,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
        }[self.schedule]
        for optimizer, peak in zip(self.all, self.peaks, strict=True):
            optimizer.param_groups[0]["lr"] = factor * peak

    def step(self, move_policy: bool) -> Metrics:
        """Clip the gradients, step, clear them; their norms before clipping."""
        norms = {}
        if move_policy:
            norms["grad_norm"] = self._step(self.policy)
        if self.critic:
            norms["value_grad_norm"] = self._step(self.critic)
        self.policy.zero_grad(set_to_none=True)
        return norms

    def _step(self, optimizer: AdamW) -> float:
        norm = clip_grad_norm_(optimizer.param_groups[0]["params"], self.max_grad_norm)
        if norm.isfinite():  # one bad minibatch must not end in weights that are not numbers
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(norm)


def update(
    roles: Roles,
    experience: Experience,
    optimizers: Optimizers,
    config: PPOConfig,
    shuffle: torch.Generator,
    *,
    move_policy: bool = True,
) -> Metrics:
    """`epochs` passes over the rollout in shuffled minibatches, the remainder included.

    Each minibatch's loss is the mean over its response tokens, whatever the microbatches. Without
    `move_policy`, and after KL(old||new) has exceeded `update_kl_limit`, only the critic learns.
    """
    stats: dict[str, list[float]] = {}
    for _ in range(config.epochs):
        order = torch.randperm(len(experience.sequences), generator=shuffle)
        for rows in order.split(config.minibatch_size):
            metrics = accumulate(roles, experience, rows, config, move_policy)
            if move_policy:
                move_policy = metrics["update_kl"] <= (config.update_kl_limit or math.inf)
            metrics |= optimizers.step(move_policy)
            for key, value in metrics.items():
                stats.setdefault(key, []).append(value)
    means = {key: sum(values) / len(values) for key, values in stats.items()}
    return {**means, "learning_rate": float(optimizers.policy.param_groups[0]["lr"])}


def accumulate(
    roles: Roles, experience: Experience, rows: Tensor, config: PPOConfig, policy_too: bool = True
) -> Metrics:
    """Add the gradients of one minibatch; statistics are means over its response tokens."""
    metrics = _accumulate_policy(roles.policy, experience, rows, config) if policy_too else {}
    if roles.critic:
        metrics |= _accumulate_critic(roles.critic, experience, rows, config)
    return metrics


def _accumulate_policy(
    policy: PreTrainedModel, experience: Experience, rows: Tensor, config: PPOConfig
) -> Metrics:
    n_tokens = int(experience.sequences.mask[rows].sum())
    totals = {"policy_loss": 0.0, "clip_fraction": 0.0, "update_kl": 0.0}
    for batch in microbatches(
        experience.sequences, rows, config.max_tokens_per_batch, policy.device
    ):
        mask = batch.mask
        old, advantages = (
            _padded_rows(x, batch) for x in (experience.logprobs, experience.advantages)
        )
        new = batch_logprobs(policy, batch)
        loss = masked_sum(clipped_policy_loss(new, old, advantages, config.clip, mask), mask)
        loss = loss / n_tokens
        loss.backward()
        new, share = new.detach(), float(mask.sum()) / n_tokens
        totals["policy_loss"] += float(loss.detach())
        totals["clip_fraction"] += share * float(clip_fraction(new, old, mask, config.clip))
        totals["update_kl"] += share * float(masked_mean(k3(old, new), mask))
    return totals


def _accumulate_critic(
    critic: ValueModel, experience: Experience, rows: Tensor, config: PPOConfig
) -> Metrics:
    mask = experience.sequences.mask
    n_tokens = int(mask[rows].sum())
    value_clip = config.value_clip * float(experience.returns[mask].std(correction=0))
    total = 0.0
    for batch in microbatches(
        experience.sequences, rows, config.max_tokens_per_batch, critic.device
    ):
        old, returns = (_padded_rows(x, batch) for x in (experience.values, experience.returns))
        losses = clipped_value_loss(critic(batch), old, returns, value_clip, batch.mask)
        loss = masked_sum(losses, batch.mask) / (n_tokens * critic.scale**2)  # in its own units
        loss.backward()
        total += float(loss.detach())
    return {"value_loss": total}


def _padded_rows(x: Tensor, batch: Batch) -> Tensor:
    """The batch's rows of an (N, T) tensor, cut to its (b, T') and on its device."""
    return x[batch.rows, : batch.mask.shape[1]].to(batch.mask.device)


def generator(seed: int) -> torch.Generator:
    """A CPU generator of its own; the run's random numbers never depend on global state."""
    return torch.Generator().manual_seed(seed)
