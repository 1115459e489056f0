"""What a rollout is, and what any engine that samples one must offer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

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
    """y ~ pi(. | x)."""

    def sample(self, prompts: list[list[int]], seed: int, temperature: float = 1.0) -> Rollout:
        """One response to each prompt; the same seed gives the same responses."""
        ...
