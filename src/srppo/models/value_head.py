"""The critic: one linear unit on the policy's own hidden states."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers import PreTrainedModel


class ValueHead(nn.Module):
    """V(x, y_<t) = shift + scale * linear(h): estimate in nats of the return from a prefix on.

    h is what the policy's output head reads; no gradient flows back into it, so the critic costs
    no second trunk and cannot disturb the policy. It is normed and divided by its width, so that
    one step of AdamW moves a unit-sized value by about its learning rate, whatever the model. The
    weights start at zero. `shift` and `scale` are the mean and standard deviation of the first
    rollout's returns: sums over a response can be hundreds of nats, which a unit-sized head would
    take hundreds of steps to reach, and until then every response would look better than expected,
    the more so near its end (docs/LOG.md).
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        width = model.config.get_text_config().hidden_size
        self.linear = nn.Linear(width, 1, device=model.device)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("shift", torch.tensor(math.nan, device=model.device))
        self.register_buffer("scale", torch.tensor(math.nan, device=model.device))

    @property
    def calibrated(self) -> bool:
        """Whether `calibrate` was called."""
        return not bool(self.shift.isnan())

    def calibrate(self, returns: Tensor, mask: Tensor) -> None:
        """Set `shift` and `scale` from the returns (N, T) of a first rollout, nats."""
        first = returns[mask]
        self.shift.fill_(first.mean())
        self.scale.fill_(first.std(correction=0).clamp(min=1e-3))

    def forward(self, hidden: Tensor) -> Tensor:
        """(n,) float32 nats of (n, H) hidden states; NaN before `calibrate`."""
        return self.in_nats(self.units(hidden))

    def units(self, hidden: Tensor) -> Tensor:
        """(n,) values before `shift` and `scale`, which only a rollout's returns can give."""
        h = hidden.detach().float()
        units: Tensor = self.linear(rms_norm(h, h.shape[-1:]) / h.shape[-1]).squeeze(-1)
        return units

    def in_nats(self, units: Tensor) -> Tensor:
        """Values in nats from `units`."""
        return self.shift.to(units) + self.scale.to(units) * units
