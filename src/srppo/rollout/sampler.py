"""What a rollout is, and what any engine that samples one must offer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from srppo import distributed
from srppo.models.batching import Sequences


@dataclass(frozen=True)
class Rollout:
    """Responses sampled from a policy."""

    sequences: Sequences
    """N prompts with their sampled responses."""
    logprobs: Tensor
    """(N, T) float32 nats under the sampler's own distribution; zero at padding."""
    ended: Tensor
    """(N,) bool: the response ended with EOS, or where it was told to; False: it was cut off."""
    exact: bool = False
    """`logprobs` are the sampled policy's own at temperature 1, to rounding: a trainer of that
    policy need not score the rollout under it again."""
    value_units: Tensor | None = None
    """(N, T) the critic's `units` before each token, from the pass that sampled it; zero at
    padding. None: the sampler has no critic."""


class Sampler(Protocol):
    """y ~ pi(. | x). Stage 2 calls, at each step:

    wake, update_weights, sample, sleep

    and `close` at the end. Who shares the policy's module inherits that all but `sample` does
    nothing. Of several processes all call alike, and each gets the whole rollout.
    """

    def sample(self, prompts: list[list[int]], seed: int) -> Rollout:
        """One response to each prompt, at temperature 1; `seed` decides the responses, as far as
        the engine's arithmetic does not depend on what else it computes."""
        ...

    def wake(self) -> None:
        """Take back the memory that sampling needs."""
        return

    def update_weights(self) -> None:
        """From here on, sample from the policy as it is now."""
        return

    def sleep(self) -> None:
        """Give memory back until `wake`."""
        return

    def close(self) -> None:
        """Nothing is sampled any more."""
        return


@dataclass(frozen=True)
class Response:
    """What another engine sampled for one prompt."""

    ids: list[int]
    """EOS included."""
    logprobs: list[float]
    """Of each id, nats, by the engine's arithmetic."""


def assemble(
    prompts: list[list[int]], found: Mapping[int, Response], eos_token_id: int, max_new_tokens: int
) -> Rollout:
    """The responses that all processes found, each at other places in `prompts`, as one rollout."""
    N, T = len(prompts), max_new_tokens
    ids, lengths = torch.zeros(N, T, dtype=torch.int64), torch.zeros(N, dtype=torch.int64)
    logprobs = torch.zeros(N, T)
    for i, response in found.items():
        n = len(response.ids)
        ids[i, :n], logprobs[i, :n] = torch.tensor(response.ids), torch.tensor(response.logprobs)
        lengths[i] = n
    distributed.add([ids, logprobs, lengths])
    longest = int(lengths.max())
    mask = torch.arange(longest) < lengths[:, None]
    last = ids.gather(1, lengths[:, None] - 1).squeeze(1)
    sequences = Sequences(prompts, ids[:, :longest], mask)
    return Rollout(sequences, logprobs[:, :longest], ended=last == eos_token_id)
