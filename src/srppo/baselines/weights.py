"""ExPO: pi_sft's step away from pi_base, taken further in the weights."""

from __future__ import annotations

import torch

from srppo.models.roles import Role


@torch.no_grad()
def extrapolate_weights(policy: Role, base: Role, alpha: float) -> None:
    """theta_sft + alpha (theta_sft - theta_base) in place of theta_sft; alpha 0 changes nothing.

    Args:
        policy: equal to pi_sft, float32.
        base: pi_base, with weights of its own.

    Source: arXiv:2404.16792.
    """
    with policy.active() as model, base.active() as start:
        for theta, origin in zip(model.parameters(), start.parameters(), strict=True):
            theta.add_(theta - origin.to(theta), alpha=alpha)
