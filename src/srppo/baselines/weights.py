"""ExPO: pi_sft's step away from pi_base, taken further in the weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from srppo.models.roles import Role


@torch.no_grad()
def extrapolate_weights(policy: Role, base: Role, alpha: float) -> None:
    """theta_sft + alpha (theta_sft - theta_base) in place of theta_sft; alpha 0 changes nothing.

    Args:
        policy: equal to pi_sft, float32.
        base: pi_base, with weights of its own.

    Source: arXiv:2404.16792.
    """
    for theta, origin in zip(policy.model.parameters(), base.model.parameters(), strict=True):
        here = _here(theta)
        here.add_(here - _here(origin).to(here), alpha=alpha)


def _here(weight: Tensor) -> Tensor:
    """What this process holds of it."""
    return weight.to_local() if isinstance(weight, DTensor) else weight
