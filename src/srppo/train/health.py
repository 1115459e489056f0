"""Steps that would teach nothing: numbers that are none, and rollouts that say nothing."""

from __future__ import annotations

import math

from torch import Tensor

from srppo.rollout.sampler import Rollout

ENOUGH = 16
"""Responses; that fewer are all cut off, or all alike, may be chance."""
COLLAPSED = 1e-4
"""Nats a token: at so little entropy some ten thousand tokens are sampled before one is another
than the likeliest."""
ALIKE = 1e-6
"""Share of the reward's size by which rounding lets equal rewards differ."""


def ailment(numbers: dict[str, Tensor], rollout: Rollout, metrics: dict[str, float]) -> str | None:
    """What is wrong with a step before its update, in words; None: nothing.

    Args:
        numbers: (N, T) each, by name; finite at response tokens.
        metrics: the step's, entropy in nats a token, reward in nats a response.
    """
    mask, ended = rollout.sequences.mask, rollout.ended
    for name, x in numbers.items():
        if bad := int((mask & ~x.isfinite()).sum()):
            return f"{name} is not a finite number at {bad} of {int(mask.sum())} response tokens"
    if len(ended) < ENOUGH:
        return None
    if not ended.any():
        return f"all {len(ended)} responses were cut off at {mask.shape[1]} tokens"
    if metrics["entropy"] < COLLAPSED:
        return f"the policy's entropy has collapsed to {metrics['entropy']:.1g} nats a token"
    if metrics["reward_std"] <= ALIKE * max(1.0, abs(metrics["reward"])):
        return f"the reward of all {len(ended)} responses is {metrics['reward']:.4g} nats"
    return None


def not_finite(metrics: dict[str, float]) -> str | None:
    """What is wrong with an update, in words: a gradient's norm that is no number."""
    for name in ("grad_norm", "value_grad_norm"):
        if not math.isfinite(metrics.get(name, 0.0)):
            return f"{name} is {metrics[name]} in a minibatch"
    return None
