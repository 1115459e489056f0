"""Where a step's time goes, and how near it comes to what the machine can do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from srppo import distributed
from srppo.config import PPOConfig
from srppo.models.precision import computing
from srppo.models.roles import Roles
from srppo.rollout.sampler import Rollout
from srppo.train.cost import Shape, step_flops

ENOUGH = 0.05
"""Seconds after which a product is large enough to be timed."""


class Stopwatch:
    """Seconds by phase. Phases end with numbers on the CPU, so a GPU has finished by then."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._since = time.monotonic()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Adds what happens inside to the phase."""
        started = time.monotonic()
        yield
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.monotonic() - started

    def lap(self) -> dict[str, float]:
        """Seconds by phase since the last lap; `other` is what no phase claims."""
        now = time.monotonic()
        seconds = self._seconds | {"other": now - self._since - sum(self._seconds.values())}
        self._seconds, self._since = {}, now
        return seconds


class Pace:
    """Turns a step's seconds into rates."""

    def __init__(self, roles: Roles, config: PPOConfig) -> None:
        with roles.policy.active() as model:
            self.shape = Shape.of(model)
            whole = sum(p.numel() for p in roles.policy.parameters()) > self.shape.block // 2
        self.train_weights = whole
        self.epochs = config.epochs
        with computing(config.compute, roles.policy.device):
            self.rate = matmul_rate(roles.policy.device)

    def of(self, rollout: Rollout, seconds: dict[str, float]) -> dict[str, float]:
        """`time/` metrics of a step."""
        y = rollout.sequences
        lengths = y.lengths.tolist()
        flops = step_flops(
            self.shape, [len(p) for p in y.prompt_ids], lengths, self.epochs, self.train_weights
        )
        working = sum(seconds[phase] for phase in ("rollout", "scoring", "update"))
        return {
            **{f"time/{phase}": value for phase, value in seconds.items()},
            "time/tokens_per_second": sum(lengths) / working,
            "time/attainable_share": flops.total / working / (self.rate * distributed.size()),
        }


def matmul_rate(device: torch.device) -> float:
    """Floating-point operations per second of a large float32 matrix product, as `computing` lets
    linear layers multiply; the best of three."""
    size = 512
    while True:
        x = torch.randn(size, size, device=device, requires_grad=True)
        seconds = min(_timed(x) for _ in range(3))
        if seconds > ENOUGH:
            return 2 * size**3 / seconds
        size *= 2


def _timed(x: torch.Tensor) -> float:
    started = time.monotonic()
    float(torch.nn.functional.linear(x, x)[0, 0].detach())  # waits for a GPU
    return time.monotonic() - started
