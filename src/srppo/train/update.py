"""The update of one PPO step: shuffled minibatches, clipped losses, two optimizers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel

from srppo import distributed
from srppo.algo.all_action import all_action_loss
from srppo.algo.kl import k3
from srppo.algo.logprobs import token_logprobs
from srppo.algo.loss import clip_fraction, clipped_policy_loss, clipped_value_loss
from srppo.algo.masking import masked_mean
from srppo.config import PPOConfig
from srppo.models.batching import Batch, input_lengths, microbatches
from srppo.models.memory import Budget
from srppo.models.precision import computing
from srppo.models.roles import Roles
from srppo.models.scoring import chunks, hidden_states, output_logits
from srppo.rollout.sampler import Rollout
from srppo.train.all_action import FrozenStates
from srppo.train.state import Tree, load_optimizer, load_tensors, misfit, optimizer_state

Metrics = dict[str, float]


@dataclass(frozen=True)
class Experience:
    """One rollout with all that an update needs; tensors are (N, T), zero at padding."""

    rollout: Rollout
    logprobs: Tensor
    """log pi_theta before the update, nats: the ratio's denominator."""
    values: Tensor
    """V before the update, nats."""
    advantages: Tensor
    returns: Tensor
    """What the critic learns, nats."""
    frozen: FrozenStates | None = None
    """All-action: what both frozen models say about every token."""


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
        """Sum the gradients over all processes, clip them, step, clear them; their norms before
        clipping."""
        norms = {}
        self.add_up()
        if move_policy:
            norms["grad_norm"] = clipped_step(self.policy, self.max_grad_norm)
        if self.critic:
            norms["value_grad_norm"] = clipped_step(self.critic, self.max_grad_norm)
        self.policy.zero_grad(set_to_none=True)
        return norms

    def add_up(self) -> None:
        """Sum the gradients over all processes."""
        add_gradients(p for o in self.all for p in o.param_groups[0]["params"])

    def clear(self) -> None:
        """Forget all gradients."""
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)


def add_gradients(weights: Iterable[nn.Parameter]) -> None:
    """Sum them over all processes; those of sharded weights have been, on their way back."""
    grads = (p.grad for p in weights if p.grad is not None)
    distributed.add(g for g in grads if not isinstance(g, DTensor))


def clip(weights: Iterable[nn.Parameter], max_grad_norm: float) -> Tensor:
    """Scale the gradients down to that norm; the norm from before."""
    norm = clip_grad_norm_(weights, max_grad_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clipped_step(optimizer: Optimizer, max_grad_norm: float) -> float:
    """Clip, step, clear; the norm before clipping. Where that is no number, there is no step."""
    norm = clip(optimizer.param_groups[0]["params"], max_grad_norm)
    if norm.isfinite():  # one bad minibatch must not end in weights that are not numbers
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)


@dataclass(frozen=True)
class Trained:
    """What a step of stage 2 changes: the rest follows from its number."""

    roles: Roles
    optimizers: Optimizers
    budget: Budget

    def state_dict(self) -> Tree:
        """As it is between two steps."""
        critic = self.roles.critic
        return {
            "policy": self.roles.policy.parameters(),
            "critic": critic.state_dict() if critic else None,
            "tokens_per_pass": self.budget.size,
            "optimizers": [optimizer_state(optimizer) for optimizer in self.optimizers.all],
        }

    def load_state_dict(self, state: Tree) -> None:
        """As it was. Raises RunDirError if that was another model."""
        critic, saved = self.roles.critic, state["optimizers"]
        if len(saved) != len(self.optimizers.all):
            raise misfit("either it or the recipe has a critic")
        load_tensors(self.roles.policy.parameters(), state["policy"])
        if critic:
            load_tensors(critic.state_dict().values(), list(state["critic"].values()))
        self.budget.size = min(self.budget.size, state["tokens_per_pass"])
        for optimizer, values in zip(self.optimizers.all, saved, strict=True):
            load_optimizer(optimizer, values)


def update(
    roles: Roles,
    experience: Experience,
    optimizers: Optimizers,
    config: PPOConfig,
    shuffle: torch.Generator,
    *,
    move_policy: bool = True,
    budget: Budget | None = None,
) -> Metrics:
    """`epochs` passes over the rollout in shuffled minibatches, the remainder included.

    Each minibatch's loss is the mean over its response tokens, whatever the microbatches. Without
    `move_policy`, and after KL(old||new) has exceeded `update_kl_limit`, only the critic learns.
    """
    stats: dict[str, list[float]] = {}
    budget = budget or Budget(config.max_tokens_per_batch)
    for _ in range(config.epochs):
        order = torch.randperm(len(experience.rollout.sequences), generator=shuffle)
        for rows in order.split(config.minibatch_size):
            with computing(config.compute, roles.policy.device):  # anew: weights have changed
                metrics = budget.fit(
                    partial(accumulate, roles, experience, rows, config, move_policy),
                    undo=optimizers.clear,
                )
            if move_policy:
                move_policy = metrics["update_kl"] <= (config.update_kl_limit or math.inf)
            metrics |= optimizers.step(move_policy)
            for key, value in metrics.items():
                stats.setdefault(key, []).append(value)
    means = {key: sum(values) / len(values) for key, values in stats.items()}
    if "sampler_logprob_diff" in stats:  # only before the first step are the two one policy
        means["sampler_logprob_diff"] = stats["sampler_logprob_diff"][0]
    return {**means, "learning_rate": float(optimizers.policy.param_groups[0]["lr"])}


def accumulate(
    roles: Roles,
    experience: Experience,
    rows: Tensor,
    config: PPOConfig,
    policy_too: bool = True,
    max_tokens: int | None = None,
) -> Metrics:
    """Add the gradients of one minibatch; statistics are means over its response tokens.

    `max_tokens` per pass, padding included; None: the recipe's.
    """
    critic, y = roles.critic, experience.rollout.sequences
    mask, old = y.mask[rows], experience.logprobs[rows]
    n_tokens = int(mask.sum())
    value_clip = config.value_clip * float(experience.returns[y.mask].std(correction=0))
    new = torch.zeros_like(experience.logprobs)
    losses, value_losses = [], []
    padded = 0.0
    with roles.policy.active() as policy:
        limit = max_tokens or config.max_tokens_per_batch
        for batch in microbatches(y, rows, limit, roles.policy.device):
            padded += batch.input_ids.numel()
            with torch.set_grad_enabled(policy_too):
                hidden = hidden_states(policy, batch)
            if policy_too:
                loss, logprobs = backward_by_chunks(
                    policy, roles, experience, batch, hidden, n_tokens, config
                )
                losses.append(loss)
                batch.put(new, logprobs)
            if critic:
                values, returns = batch.take(experience.values), batch.take(experience.returns)
                loss = clipped_value_loss(critic(hidden), values, returns, value_clip).sum()
                loss = loss / (n_tokens * critic.scale**2)  # in its own units
                loss.backward()
                value_losses.append(loss.detach())
    sums = torch.tensor([float(sum(losses)), float(sum(value_losses)), padded]).double()
    distributed.add([new, sums])
    policy_loss, value_loss, padded = sums.tolist()
    metrics = {"value_loss": value_loss} if critic else {}
    if policy_too:
        metrics["padding"] = 1 - sum(input_lengths(y, rows)) / padded
        if experience.rollout.exact:  # otherwise `describe` has compared the two
            sampled = experience.rollout.logprobs[rows]
            off = masked_mean((new[rows] - sampled).abs(), mask)
            metrics["sampler_logprob_diff"] = float(off)
        metrics |= {
            "policy_loss": policy_loss,
            "clip_fraction": float(clip_fraction(new[rows], old, mask, config.clip)),
            "update_kl": float(masked_mean(k3(old, new[rows]), mask)),
        }
    return metrics


def backward_by_chunks(
    policy: PreTrainedModel,
    roles: Roles,
    experience: Experience,
    batch: Batch,
    hidden: Tensor,
    n_tokens: int,
    config: PPOConfig,
) -> tuple[Tensor, Tensor]:
    """Add the policy's gradients of one microbatch: the output head's chunk by chunk, the trunk's
    at once with what the chunks sent back. The logits of one chunk are all that ever exist.

    Returns:
        The sum of its losses over `n_tokens`, the minibatch's response tokens, and (n,) logprobs.
    """
    total = torch.zeros((), device=hidden.device)
    logprobs, grads = [], []
    for some in chunks(policy, batch):
        head = hidden[some].detach().requires_grad_()
        logits = output_logits(policy, head)
        losses, part = token_losses(roles, experience, batch, some, logits, config)
        loss = losses.sum() / n_tokens
        loss.backward()
        assert head.grad is not None
        total += loss.detach()
        logprobs.append(part.detach())
        grads.append(head.grad)
    hidden.backward(torch.cat(grads))
    return total, torch.cat(logprobs)


def token_losses(
    roles: Roles,
    experience: Experience,
    batch: Batch,
    some: slice,
    logits: Tensor,
    config: PPOConfig,
) -> tuple[Tensor, Tensor]:
    """The policy's loss at a chunk of a batch's tokens, and their logprobs; (n,) each."""
    ids = batch.response_ids[some]
    old, advantages = (batch.take(x)[some] for x in (experience.logprobs, experience.advantages))
    if experience.frozen is None:
        logprobs = token_logprobs(logits, ids)
        return clipped_policy_loss(logprobs, old, advantages, config.clip), logprobs
    soft = experience.frozen.soft_rewards(roles, batch, some, config)
    beta, share = config.beta, config.sampled_share
    losses = all_action_loss(logits, soft, ids, old, advantages, beta, share, config.clip)
    return losses, token_logprobs(logits.detach(), ids)


def generator(seed: int) -> torch.Generator:
    """A CPU generator of its own; the run's random numbers never depend on global state."""
    return torch.Generator().manual_seed(seed)
