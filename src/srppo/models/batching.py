"""Prompts with responses as batches: contiguous, similar lengths together, padded on the right.

    prompt, response │ padding
    x x x y y y      │
    x x y y          │ . .

A causal model never looks at what follows, so no attention mask is needed and every row's numbers
are those it would have alone. The last response token is predicted but never read: it is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from srppo import distributed

MAX_PADDING = 0.04
"""A batch is closed before padding exceeds this share of it..."""
MIN_TOKENS = 128
"""...unless it holds fewer tokens than this: the call itself would then cost more than padding."""


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
    """b rows of `Sequences` with n response tokens, row after row, as a model takes them."""

    rows: Tensor
    """(b,) which rows of the Sequences; on the CPU."""
    mask: Tensor
    """(b, T) bool, their response tokens; on the CPU."""
    input_ids: Tensor
    """(b, S) prompt and response without its last token, right-padded."""
    predictors: Tensor
    """(n,) places among the b*S inputs whose outputs predict the response tokens."""
    response_ids: Tensor
    """(n,) the response tokens."""

    def __len__(self) -> int:
        return len(self.response_ids)

    def take(self, x: Tensor) -> Tensor:
        """(n,) the batch's response tokens of an (N, T) tensor, on the batch's device."""
        return x[self.rows][self.mask].to(self.response_ids.device)

    def put(self, into: Tensor, values: Tensor) -> None:
        """The inverse: (n,) values to their places in an (N, T) tensor, other places of it kept."""
        into[self.rows] = into[self.rows].masked_scatter(self.mask, values.to(into))


def make_batch(sequences: Sequences, rows: Tensor, device: torch.device) -> Batch:
    """The given rows as one batch."""
    mask = sequences.mask[rows]
    responses, lengths = sequences.response_ids[rows], mask.sum(1)
    prompts = [sequences.prompt_ids[i] for i in rows.tolist()]
    starts = torch.tensor([len(p) for p in prompts]) - 1  # the input that predicts token 0
    width = int((starts + lengths).max())
    input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    for k, (prompt, n) in enumerate(zip(prompts, lengths.tolist(), strict=True)):
        input_ids[k, : len(prompt) + n - 1] = torch.cat(
            [torch.tensor(prompt), responses[k, : n - 1]]
        )
    row, t = mask.nonzero(as_tuple=True)
    return Batch(
        rows=rows,
        mask=mask,
        input_ids=input_ids.to(device),
        predictors=(row * width + starts[row] + t).to(device),
        response_ids=responses[mask].to(device),
    )


def microbatches(
    sequences: Sequences, rows: Tensor, max_tokens: int, device: torch.device
) -> Iterator[Batch]:
    """This process's share of the given rows in batches of at most `max_tokens` tokens, padding
    included; every process gets the same number of batches, the last ones may be idle.

    Longest first, so that memory is known at once. A row longer than `max_tokens` is a batch of
    its own.
    """
    lengths = input_lengths(sequences, rows)
    plans = [
        [[share[k] for k in group] for group in cut([lengths[i] for i in share], max_tokens)]
        for share in distributed.shares(lengths)
    ]
    mine = plans[distributed.rank()]
    for places in mine:
        yield make_batch(sequences, rows[places], device)
    for _ in range(max(map(len, plans)) - len(mine)):
        yield idle_batch(sequences, device)


def idle_batch(sequences: Sequences, device: torch.device) -> Batch:
    """One input without a response token: a pass over it takes part in what all processes do, and
    adds nothing."""
    return Batch(
        rows=torch.zeros(1, dtype=torch.int64),
        mask=torch.zeros_like(sequences.mask[:1]),
        input_ids=torch.tensor([sequences.prompt_ids[0][:1]], device=device),
        predictors=torch.zeros(0, dtype=torch.int64, device=device),
        response_ids=torch.zeros(0, dtype=torch.int64, device=device),
    )


def input_lengths(sequences: Sequences, rows: Tensor) -> list[int]:
    """Tokens that a model reads of each row."""
    responses = sequences.lengths[rows].tolist()
    return [
        len(sequences.prompt_ids[i]) + n - 1 for i, n in zip(rows.tolist(), responses, strict=True)
    ]


def cut(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Places in `lengths`, longest first, in groups that are padded together."""
    groups: list[list[int]] = []
    widest = used = 0
    for place in sorted(range(len(lengths)), key=lambda k: (-lengths[k], k)):
        n = lengths[place]
        padded = (len(groups[-1]) + 1) * widest if groups else 0
        too_much_padding = used >= MIN_TOKENS and padded - used - n > MAX_PADDING * padded
        if not groups or padded > max_tokens or too_much_padding:
            groups.append([])
            widest, used = n, 0
        groups[-1].append(place)
        used += n
    return groups
