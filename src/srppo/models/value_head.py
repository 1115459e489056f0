"""The critic: a transformer trunk and one linear unit on top."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from srppo.models.batching import Batch, Sequences, microbatches


class ValueModel(nn.Module):
    """V(x, y_<t): estimate in nats of the return from each prefix on.

    The trunk is a copy of a language model's; the head starts at zero, so that the first
    advantages are the plain returns and not noise (a cold critic poisons early updates).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.trunk = copy.deepcopy(model.base_model).requires_grad_(True)
        width = model.config.get_text_config().hidden_size
        self.head = nn.Linear(width, 1, device=model.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.weight.device

    def forward(self, batch: Batch) -> Tensor:
        """(b, T') values of the prefixes before each response token, float32 nats."""
        T = batch.response_ids.shape[1]
        hidden = self.trunk(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).last_hidden_state[:, -T - 1 : -1]
        values: Tensor = self.head(hidden.float()).squeeze(-1)
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
