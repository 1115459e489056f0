"""Prompts with responses as padded batches: prompts end and responses start at one column.

    prompt, left-padded │ response, right-padded
    . . x x x           │ y y y .

So "the logits of the response positions" is one slice for the whole batch, which every
transformers model offers as `logits_to_keep`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """N prompts, each with one response."""

    prompt_ids: list[list[int]]
    """N lists of token ids."""
    response_ids: Tensor
    """(N, T) int64, right-padded."""
    mask: Tensor
    """(N, T) bool, True at response tokens (EOS included)."""

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @property
    def lengths(self) -> Tensor:
        """(N,) int64, response tokens."""
        return self.mask.sum(1)

    @staticmethod
    def of(prompt_ids: list[list[int]], response_ids: Sequence[Sequence[int]]) -> Sequences:
        """From lists of token ids; no response may be empty."""
        longest = max(len(r) for r in response_ids)
        ids = torch.zeros(len(response_ids), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for i, response in enumerate(response_ids):
            ids[i, : len(response)] = torch.tensor(response)
            mask[i, : len(response)] = True
        return Sequences(prompt_ids, ids, mask)


@dataclass(frozen=True)
class Batch:
    """Some rows of `Sequences`, padded to their own longest, as a model takes them."""

    rows: Tensor
    """(b,) which rows of the Sequences."""
    input_ids: Tensor
    """(b, P + T')"""
    attention_mask: Tensor
    """(b, P + T')"""
    position_ids: Tensor
    """(b, P + T') each row counts from 0 at its first token."""
    response_ids: Tensor
    """(b, T')"""
    mask: Tensor
    """(b, T')"""


def pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, both (b, P)."""
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids.to(device), mask.to(device)


def positions(attention_mask: Tensor) -> Tensor:
    """(b, S) positions that padding does not advance."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


def make_batch(sequences: Sequences, rows: Tensor, device: torch.device) -> Batch:
    """Pad the given rows together."""
    prompts = [sequences.prompt_ids[i] for i in rows.tolist()]
    width = int(sequences.lengths[rows].max())
    prompt_ids, prompt_mask = pad_left(prompts, device)
    response_ids = sequences.response_ids[rows, :width].to(device)
    mask = sequences.mask[rows, :width].to(device)
    attention_mask = torch.cat([prompt_mask, mask.long()], dim=1)
    return Batch(
        rows=rows,
        input_ids=torch.cat([prompt_ids, response_ids], dim=1),
        attention_mask=attention_mask,
        position_ids=positions(attention_mask),
        response_ids=response_ids,
        mask=mask,
    )


def microbatches(
    sequences: Sequences, rows: Tensor, max_tokens: int, device: torch.device
) -> Iterator[Batch]:
    """The given rows in batches of at most `max_tokens` tokens, padding included.

    Rows of similar length go together. A row longer than `max_tokens` is a batch of its own.
    """
    lengths = [
        (len(sequences.prompt_ids[i]), n)
        for i, n in zip(rows.tolist(), sequences.lengths[rows].tolist(), strict=True)
    ]
    order = sorted(range(len(lengths)), key=lambda k: (sum(lengths[k]), k))
    start = 0
    longest_prompt = longest_response = 0
    for end, k in enumerate(order):
        prompt, response = lengths[k]
        width = max(longest_prompt, prompt) + max(longest_response, response)
        if end > start and (end - start + 1) * width > max_tokens:
            yield make_batch(sequences, rows[order[start:end]], device)
            start, longest_prompt, longest_response = end, 0, 0
        longest_prompt = max(longest_prompt, prompt)
        longest_response = max(longest_response, response)
    if order:
        yield make_batch(sequences, rows[order[start:]], device)
