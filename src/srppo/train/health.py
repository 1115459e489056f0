"""Steps that would teach nothing: numbers that are none, and rollouts that say nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from srppo.rollout.sampler import Rollout

ENOUGH = 16
"""Responses; that fewer are all cut off, or all alike, may be chance."""
COLLAPSED = 1e-4
"""Nats a token: at so little entropy some ten thousand tokens are sampled before one is another
than the likeliest."""
DISAGREE = 0.5
"""Nats a token, in the mean, between the log-probabilities of sampler and trainer: rounding makes
a few hundredths at most, another model mostly more."""
ALIKE = 1e-6
"""Share of the reward's size by which rounding lets equal rewards differ."""


@dataclass(frozen=True)
class Ailment:
    """What is wrong with a step, and what helps, both in words."""

    reason: str
    cure: str = (
        "Lower the learning rate and go on with --allow-change, or look at the data and at both "
        "models"
    )


def ailment(
    numbers: dict[str, Tensor], rollout: Rollout, metrics: dict[str, float]
) -> Ailment | None:
    """What is wrong with a step before its update; None: nothing.

    Args:
        numbers: (N, T) each, by name; finite at response tokens.
        metrics: the step's, entropy in nats a token, reward in nats a response.
    """
    mask, ended = rollout.sequences.mask, rollout.ended
    for name, x in numbers.items():
        if bad := int((mask & ~x.isfinite()).sum()):
            return Ailment(
                f"{name} is not a finite number at {bad} of {int(mask.sum())} response tokens"
            )
    if found := _disagreement(metrics):
        return found
    if len(ended) < ENOUGH:
        return None
    if not ended.any():
        return Ailment(
            f"all {len(ended)} responses were cut off at {mask.shape[1]} tokens",
            "If the SFT model has not learnt to end (srppo chat shows it), train it for longer or "
            "at a higher rate (sft.epochs, sft.learning_rate) or raise data.max_response_tokens, "
            "in a new output_dir; if stage 2 has unlearnt it, set ppo.missing_eos_penalty",
        )
    if metrics["entropy"] < COLLAPSED:
        return Ailment(
            f"the policy's entropy has collapsed to {metrics['entropy']:.1g} nats a token",
            "Raise ppo.kl_coef or lower ppo.learning_rate and go on with --allow-change",
        )
    if metrics["reward_std"] <= ALIKE * max(1.0, abs(metrics["reward"])):
        return Ailment(
            f"the reward of all {len(ended)} responses is {metrics['reward']:.4g} nats",
            "If SFT and base model are nearly one, train SFT for longer, in a new output_dir; if "
            "all responses are one, raise ppo.kl_coef and go on with --allow-change",
        )
    return None


def not_finite(metrics: dict[str, float]) -> Ailment | None:
    """What is wrong with an update: a loss or a gradient's norm that is no number (after such a
    loss the policy rests, and there is no norm), or responses that were not the policy's."""
    for name in ("policy_loss", "value_loss", "grad_norm", "value_grad_norm"):
        if not math.isfinite(metrics.get(name, 0.0)):
            return Ailment(f"{name} is {metrics[name]} in a minibatch")
    return _disagreement(metrics)


def _disagreement(metrics: dict[str, float]) -> Ailment | None:
    """Known before the update, or in its first minibatch where the sampler's log-probabilities
    stand for the trainer's."""
    off = metrics.get("sampler_logprob_diff", 0.0)
    if off <= DISAGREE:
        return None
    return Ailment(
        f"sampler and trainer disagree by {off:.2g} nats a token: the responses are not this "
        "policy's",
        "docs/rollout.md says what to look at",
    )
