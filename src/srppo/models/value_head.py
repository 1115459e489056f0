"""The critic: a small network on the policy's own hidden states."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, rms_norm
from transformers import PreTrainedModel


class ValueHead(nn.Module):
    """V(x, y_<t) = shift + scale * network(h): estimate in nats of the return from a prefix on.

    h is what the policy's output head reads; no gradient flows back into it, so the critic costs
    no second trunk and cannot disturb the policy. One hidden layer, for a linear unit explains too
    little (docs/LOG.md). The last weights start at zero. `shift` and `scale` are the mean and
    standard deviation of the first rollout's returns: sums over a response can be hundreds of
    nats, which a unit-sized network would take hundreds of steps to reach, and until then every
    response would look better than expected, the more so near its end (docs/LOG.md).
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        width = model.get_output_embeddings().weight.shape[1]
        self.hidden, self.out = nn.Linear(width, width), nn.Linear(width, 1)
        generator = torch.Generator().manual_seed(0)  # equal runs have equal critics
        nn.init.normal_(self.hidden.weight, std=width**-0.5, generator=generator)
        for zero in (self.hidden.bias, self.out.weight, self.out.bias):
            nn.init.zeros_(zero)
        self.register_buffer("shift", torch.tensor(math.nan))
        self.register_buffer("scale", torch.tensor(math.nan))
        self.to(model.device)

    @property
    def calibrated(self) -> bool:
        """Whether `calibrate` was called."""
        return not bool(self.shift.isnan())

    def calibrate(self, returns: Tensor, mask: Tensor) -> None:
        """Set `shift` and `scale` from the returns (N, T) of a first rollout, nats; from one that
        holds a number that is none nothing is set."""
        first = returns[mask]
        if first.isfinite().all():
            self.shift.fill_(first.mean())
            self.scale.fill_(first.std(correction=0).clamp(min=1e-3))

    def forward(self, hidden: Tensor) -> Tensor:
        """(n,) float32 nats of (n, H) hidden states; NaN before `calibrate`."""
        return self.in_nats(self.units(hidden))

    def units(self, hidden: Tensor) -> Tensor:
        """(n,) values before `shift` and `scale`, which only a rollout's returns can give."""
        with torch.autocast(hidden.device.type, enabled=False):
            h = hidden.detach().float()
            units: Tensor = self.out(gelu(self.hidden(rms_norm(h, h.shape[-1:])))).squeeze(-1)
            return units

    def in_nats(self, units: Tensor) -> Tensor:
        """Values in nats from `units`."""
        return self.shift.to(units) + self.scale.to(units) * units
