"""What would silently train for something else than pi*: asked at start, of any engine's settings.

pi* is proportional to pi_sft (pi_sft/pi_base)^(1/beta), docs/math.md. Each check raises
ConfigError.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from srppo.errors import ConfigError

WHOLE: Mapping[str, tuple[Any, ...]] = {
    "temperature": (1.0,),
    "top_p": (1.0, None),
    "top_k": (0, -1, None),
    "min_p": (0.0, None),
    "repetition_penalty": (1.0, None),
}
"""Settings of a sampler that takes the policy as it is."""


def require_whole_distribution(settings: Mapping[str, Any], prefix: str = "") -> None:
    """Sampling from the policy itself: the reward and its optimum are about that distribution."""
    for name, plain in WHOLE.items():
        value = settings.get(name, plain[0])
        if value not in plain:
            raise ConfigError(
                f"{prefix}{name}={value}: responses would be sampled from another distribution "
                "than the policy, and the policy be trained towards another optimum. Set "
                f"{prefix}{name}={plain[0]}."
            )


def require_kl(name: str, kl_coef: float | None, default: float | None) -> None:
    """A KL penalty, and not of the engine's own size. `default` None: the engine has none."""
    cure = f"Set {name} to 0.5, or 0.2 for a policy farther from the SFT model."
    if not kl_coef or kl_coef < 0:
        raise ConfigError(
            f"{name}={kl_coef}: without a KL penalty the optimum is one response, the one that "
            f"pi_sft raised most over pi_base. {cure}"
        )
    if kl_coef == default:
        raise ConfigError(
            f"{name}={kl_coef} is the engine's default, made for rewards between 0 and 1: with a "
            f"log-ratio as reward the optimum is pi_sft (pi_sft/pi_base)^{1 / kl_coef:g}. {cure}"
        )


def require_no_clip(name: str, bounds: tuple[float, float] | None, cure: str) -> None:
    """No bounds that a sum of log-ratios would reach."""
    if bounds is not None and min(-bounds[0], bounds[1]) < 10_000:
        raise ConfigError(
            f"{name}={tuple(bounds)}: the reward is a sum over tokens and soon beyond that; then "
            f"all good responses would be worth the same. {cure}"
        )


def require_unscaled(name: str, value: object, plain: object) -> None:
    """Advantages that are not divided by each prompt's own spread."""
    if value != plain:
        raise ConfigError(
            f"{name}={value}: dividing by the spread of each prompt's rewards gives every prompt a "
            f"KL coefficient of its own. Set {name}={plain}."
        )
