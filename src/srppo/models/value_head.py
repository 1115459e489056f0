"""The critic: a transformer trunk and one linear unit on top."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from srppo.models.batching import Batch, Sequences, microbatches


class ValueModel(nn.Module):
    """V(x, y_<t) = shift + scale * head(trunk): estimate in nats of the return from a prefix on.

    The trunk is a copy of a language model's; the head starts at zero. `shift` and `scale` are the
    mean and standard deviation of the first rollout's returns: sums over a response can be
    hundreds of nats, which a unit-sized head would take hundreds of steps to reach, and until then
    every response would look better than expected, the more so near its end (docs/LOG.md).
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.trunk = copy.deepcopy(model.base_model).float().requires_grad_(True)
        width = model.config.get_text_config().hidden_size
        self.head = nn.Linear(width, 1, device=model.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
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

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.weight.device

    def forward(self, batch: Batch) -> Tensor:
        """(b, T') values of the prefixes before each response token, float32 nats.

        NaN before `calibrate`.
        """
        T = batch.response_ids.shape[1]
        hidden = self.trunk(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).last_hidden_state[:, -T - 1 : -1]
        values: Tensor = self.shift + self.scale * self.head(hidden.float()).squeeze(-1)
        return values


@torch.no_grad()
def values_of(critic: ValueModel, sequences: Sequences, max_tokens: int) -> Tensor:
    """(N, T) values in nats on the CPU, zero at padding."""
    values = torch.zeros(sequences.mask.shape)
    rows = torch.arange(len(sequences))
    for batch in microbatches(sequences, rows, max_tokens, critic.device):
        some = torch.where(batch.mask, critic(batch), 0.0)
        values[batch.rows, : some.shape[1]] = some.cpu()
    return values
