"""What several processes tell each other, and how long that takes. docs/scaling.md has the formula.

Counted are weights and gradients. Tokens, log-probabilities and sums go between CPUs and are a
thousandth of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from srppo.config import PPOConfig, Recipe, SFTConfig
from srppo.config_controls import PairsConfig
from srppo.models.precision import Compute
from srppo.plan.architecture import Architecture
from srppo.plan.known import NETWORK, Device
from srppo.plan.memory import BYTES, FLOAT


@dataclass(frozen=True)
class Group:
    """The processes of a run, each with a device of its own."""

    nproc: int = 1
    """On each machine."""
    nodes: int = 1
    """Machines."""
    network: float = NETWORK
    """Bytes per second that a device sends to other machines."""

    @property
    def size(self) -> int:
        """All of them."""
        return self.nproc * self.nodes

    def bandwidth(self, device: Device) -> float:
        """Bytes per second that a device sends in a ring of all of them: of the slowest link."""
        return device.link if self.nodes == 1 else min(device.link, self.network)

    def __str__(self) -> str:
        where = f"{self.nodes} machines of {self.nproc}" if self.nodes > 1 else "one machine"
        return f"{self.size} processes on {where}"


@dataclass(frozen=True)
class Exchange:
    """Bytes that one of n processes sends; it receives as many. In a ring, gathering x bytes or
    summing them into pieces is (n - 1)/n x, and summing them for everybody twice that."""

    recipe: Recipe
    sizes: Architecture
    n: int
    tokens: float
    """Of a prompt with its response, in the mean."""

    def sft(self, config: SFTConfig, steps: int) -> float:
        """Stage 1."""
        rows = math.ceil(config.batch_size / self.n)
        passes = math.ceil(rows / min(rows, config.micro_batch_size))
        return self._trained(steps, steps * passes, config.compute)

    def rollout(self, config: PPOConfig, responses: int) -> float:
        """The policy, gathered once; or for every token, with `model.shard_sampling`."""
        model, data = self.recipe.model, self.recipe.data
        if not model.shard:
            return 0.0
        calls = 1
        if model.shard_sampling:
            longest = data.max_prompt_tokens + data.max_response_tokens
            rows = max(1, config.max_tokens_per_batch // longest)
            calls = math.ceil(responses / self.n / rows) * data.max_response_tokens
        return self._ring(self._policy(config.compute, calls))

    def scoring(self, config: PPOConfig, responses: int) -> float:
        """Both frozen models, and the policy where the sampler's own numbers are not exact."""
        model = self.recipe.model
        if not model.shard:
            return 0.0
        passes = self._passes(config, responses)
        frozen = BYTES[model.dtype] * (self._inside * passes + self.sizes.outside)
        again = "bfloat16" in (config.compute, model.dtype if model.lora else config.compute)
        return self._ring(2 * frozen + again * self._policy(config.compute, passes))

    def update(self, config: PPOConfig) -> float:
        """All minibatches of a step."""
        size, n = config.minibatch_size, config.rollouts_per_step
        minibatches = config.epochs * math.ceil(n / size)
        passes = minibatches * self._passes(config, min(size, n))
        return self._trained(minibatches, passes, config.compute)

    def pairs(self, config: PairsConfig, pairs: int) -> float:
        """A control on so many pairs a round, without the scores of its reference."""
        rows = math.ceil(config.batch_size / self.n)
        steps = config.rounds * config.epochs * math.ceil(pairs / config.batch_size)
        passes = steps * math.ceil(rows / config.micro_batch_size)
        sampled = config.rounds * self.rollout(self.recipe.ppo, pairs)
        return sampled + self._trained(steps, passes, "float32")

    def _trained(self, steps: int, passes: int, compute: Compute) -> float:
        """Gradients, summed once a step; of weights in pieces after each pass, in which each layer
        is gathered for the way there and for the way back."""
        model, sizes = self.recipe.model, self.sizes
        summed = 2 * steps * FLOAT * sizes.trained
        if not model.shard:
            return self._ring(summed)
        if model.lora:
            each = BYTES[model.dtype] * (2 * self._inside + sizes.outside)
            return self._ring(summed + passes * each)
        each = (2 * BYTES[compute] + FLOAT) * self._inside + 2 * FLOAT * sizes.outside
        return self._ring(passes * each)

    def _policy(self, compute: Compute, times: int) -> float:
        """Its layers so many times, what is outside them once."""
        model = self.recipe.model
        if model.lora:
            return BYTES[model.dtype] * (times * self._inside + self.sizes.outside)
        return BYTES[compute] * times * self._inside + FLOAT * self.sizes.outside

    def _passes(self, config: PPOConfig, rows: int) -> int:
        """Of one process, over its share of so many responses."""
        return math.ceil(rows / self.n * self.tokens / config.max_tokens_per_batch)

    def _ring(self, size: float) -> float:
        return (self.n - 1) / self.n * size

    @property
    def _inside(self) -> int:
        return self.sizes.weights - self.sizes.outside
