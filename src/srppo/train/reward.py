"""The reward as a recipe bounds it."""

from srppo.algo.reward import Bounds
from srppo.config import PPOConfig


def bounds_of(config: PPOConfig) -> Bounds:
    """What one token may add."""
    return Bounds(config.token_clip, config.plausibility)
