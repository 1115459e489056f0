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
    """(N,) bool: the response ended with EOS; False: it was cut off."""


class Sampler(Protocol):
    """y ~ pi(. | x)."""

    def sample(self, prompts: list[list[int]], seed: int, temperature: float = 1.0) -> Rollout:
        """One response to each prompt; the same seed gives the same responses."""
        ...
