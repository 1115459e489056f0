"""From sequences to log-probabilities: the trunk over whole rows, the output head over response
tokens only, and over a chunk of them at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from srppo import distributed
from srppo.algo.logprobs import chunk_size, token_logprobs, token_margins
from srppo.errors import ModelError
from srppo.models.batching import Batch, Sequences, microbatches
from srppo.models.roles import Role
from srppo.models.value_head import ValueHead


class _SkippedTrunk(BaseModelOutputWithPast):
    """Hidden states, and None for all else that an architecture may pass on from its trunk."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def trunk_states(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """(b, S, H) the trunk's last hidden states. Sharded weights are gathered on the way."""
    read = getattr(model, "read", None)
    if read:
        return cast(Tensor, read(**inputs))
    hidden = getattr(model.base_model(**inputs), "last_hidden_state", None)
    if hidden is None:
        raise _unknown(model)
    return cast(Tensor, hidden)


def _unknown(model: PreTrainedModel) -> ModelError:
    return ModelError(
        f"{type(model).__name__} does not keep its layers and its output head apart as srppo has "
        "to take them: it could not be scored. Take a model of another architecture."
    )


def hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """(n, H) what the output head reads to predict each response token."""
    hidden = trunk_states(model, input_ids=batch.input_ids, use_cache=False)
    return hidden.flatten(0, 1).index_select(0, batch.predictors)


def output_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """(n, V) logits of (n, H) hidden states.

    By the model's own `forward` with its trunk skipped, so that whatever an architecture does to
    its logits (soft caps, scales, biases) is done. Of a sharded model it is the forward alone: what
    gathers weights around it belongs to the trunk.
    """
    trunk = model.base_model
    own = trunk.__dict__.get("forward")
    skipped = False

    def skip(*args: Any, **kwargs: Any) -> _SkippedTrunk:
        nonlocal skipped
        skipped = True
        return _SkippedTrunk(last_hidden_state=hidden[None])

    trunk.forward = skip
    try:
        ids = torch.zeros(1, 1, dtype=torch.int64, device=hidden.device)  # for the skipped trunk
        logits: Tensor = model.forward(input_ids=ids, use_cache=False).logits
    finally:
        if own is None:  # nothing may stay that refers to the trunk: it would keep itself alive
            del trunk.forward
        else:
            trunk.forward = own
    if not skipped:  # the head read something else
        raise _unknown(model)
    return logits[0]


def rounding(model: PreTrainedModel) -> float:
    """Nats a token, in the mean, by which two ways to one log-probability may differ."""
    exact = model.dtype == torch.float32 and not getattr(model, "is_loaded_in_8bit", False)
    return 0.01 if exact else 0.5


def chunks(model: PreTrainedModel, batch: Batch) -> Iterator[slice]:
    """The batch's tokens in pieces whose logits are small."""
    size = chunk_size(model.config.get_text_config().vocab_size, batch.input_ids.device)
    for start in range(0, len(batch) or 1, size):  # of an idle batch, one that is empty
        yield slice(start, start + size)


def score(model: Role | PreTrainedModel, sequences: Sequences, max_tokens: int) -> Tensor:
    """(N, T) float32 nats on the CPU, zero at padding; log pi(y_t | x, y_<t) at temperature 1."""
    return score_with_values(model, None, sequences, max_tokens)[0]


@torch.no_grad()
def score_with_values(
    model: Role | PreTrainedModel, critic: ValueHead | None, sequences: Sequences, max_tokens: int
) -> tuple[Tensor, Tensor]:
    """`score`, and from the same pass the critic's `units`; (N, T) each, zeros without a critic."""
    logprobs, units = torch.zeros(2, *sequences.mask.shape)
    for active, batch, hidden in _passes(Role.of(model), sequences, max_tokens):
        parts = [
            token_logprobs(output_logits(active, hidden[some]), batch.response_ids[some])
            for some in chunks(active, batch)
        ]
        batch.put(logprobs, torch.cat(parts))
        if critic:
            batch.put(units, critic.units(hidden))
    distributed.add([logprobs, units])
    return logprobs, units


@torch.no_grad()
def score_with_margins(
    model: Role | PreTrainedModel, sequences: Sequences, max_tokens: int
) -> tuple[Tensor, Tensor]:
    """`score`, and from the same pass log pi(y_t | ..) - max_a log pi(a | ..); (N, T) each."""
    logprobs, margins = torch.zeros(2, *sequences.mask.shape)
    for active, batch, hidden in _passes(Role.of(model), sequences, max_tokens):
        parts = []
        for some in chunks(active, batch):
            logits, ids = output_logits(active, hidden[some]), batch.response_ids[some]
            parts.append(torch.stack([token_logprobs(logits, ids), token_margins(logits, ids)]))
        for into, values in zip((logprobs, margins), torch.cat(parts, dim=1), strict=True):
            batch.put(into, values)
    distributed.add([logprobs, margins])
    return logprobs, margins


def _passes(
    role: Role, sequences: Sequences, max_tokens: int
) -> Iterator[tuple[PreTrainedModel, Batch, Tensor]]:
    """Microbatches with the states that the output head reads."""
    rows = torch.arange(len(sequences))
    with role.active() as active:
        for batch in microbatches(sequences, rows, max_tokens, role.device):
            yield active, batch, hidden_states(active, batch)


@torch.no_grad()
def response_states(model: Role | PreTrainedModel, sequences: Sequences, max_tokens: int) -> Tensor:
    """(M, H) on the CPU, `hidden_states` of all M response tokens, row after row of `sequences`."""
    role = Role.of(model)
    starts = sequences.lengths.cumsum(0) - sequences.lengths
    states: Tensor | None = None
    rows = torch.arange(len(sequences))
    with role.active() as active:
        for batch in microbatches(sequences, rows, max_tokens, role.device):
            hidden = hidden_states(active, batch).cpu()
            if states is None:
                states = hidden.new_zeros(int(sequences.mask.sum()), hidden.shape[-1])
            row, t = batch.mask.nonzero(as_tuple=True)
            states[starts[batch.rows][row] + t] = hidden
    assert states is not None  # no rollout is empty
    distributed.add([states])
    return states
