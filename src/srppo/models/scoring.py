"""Log-probabilities of given responses under a model."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from srppo.algo.logprobs import token_logprobs
from srppo.models.batching import Batch, Sequences, microbatches


def response_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """(b, T', V) logits of the distributions that each response token was drawn from."""
    T = batch.response_ids.shape[1]
    logits: Tensor = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=T + 1,
    ).logits
    return logits[:, :-1]


def batch_logprobs(model: PreTrainedModel, batch: Batch) -> Tensor:
    """(b, T') float32 nats, log pi(y_t | x, y_<t) at temperature 1."""
    return token_logprobs(response_logits(model, batch), batch.response_ids)


@torch.no_grad()
def score(model: PreTrainedModel, sequences: Sequences, max_tokens: int) -> Tensor:
    """(N, T) float32 nats on the CPU, zero at padding; log pi(y_t | x, y_<t) at temperature 1."""
    logprobs = torch.zeros(sequences.mask.shape)
    rows = torch.arange(len(sequences))
    for batch in microbatches(sequences, rows, max_tokens, model.device):
        some = torch.where(batch.mask, batch_logprobs(model, batch), 0.0)
        logprobs[batch.rows, : some.shape[1]] = some.cpu()
    return logprobs
