"""PPO's losses per token, to be minimised, and what is logged about them.

The losses are not reduced: the trainer decides what a mean is taken over. Give `mask` where
padding may hold NaN: masking the finished loss is too late for the gradient (0 * NaN is NaN).
"""

import torch
from torch import Tensor

from srppo.algo.masking import masked_mean, require_same_shape


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip: float,
    mask: Tensor | None = None,
) -> Tensor:
    """-min(ratio A, clamp(ratio, 1 - clip, 1 + clip) A) with ratio = pi_theta / pi_old.

    Args:
        logprobs: (B, T) nats, under the policy in training; the gradient flows here.
        old_logprobs: (B, T) nats, under the policy that sampled.
        advantages: (B, T).
        clip: how far the ratio may gain from leaving 1.
        mask: (B, T) bool, True at response tokens; None reads every entry.

    Returns:
        (B, T), zero at padding if `mask` is given.

    Raises:
        ShapeError: shapes differ.

    Source: arXiv:1707.06347, eq. 7.
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    log_ratio = logprobs - old_logprobs
    if mask is not None:
        require_same_shape(logprobs=logprobs, mask=mask)
        log_ratio = torch.where(mask, log_ratio, 0.0)
        advantages = torch.where(mask, advantages, 0.0)
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def clipped_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    clip: float | Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """max((V - R)^2, (V_clipped - R)^2) / 2, V_clipped = V held within `clip` of the old value.

    Args:
        values: (B, T), of the critic in training; the gradient flows here.
        old_values: (B, T), of the critic that the advantages were computed with.
        returns: (B, T), the targets.
        clip: in the units of the returns, not relative; a tensor must broadcast to (B, T).
            Infinity switches the clipping off.
        mask: (B, T) bool, True at response tokens; None reads every entry.

    Returns:
        (B, T), zero at padding if `mask` is given.

    Raises:
        ShapeError: shapes differ.

    Source: github.com/openai/baselines, ppo2; not in the PPO paper.
    """
    require_same_shape(values=values, old_values=old_values, returns=returns)
    if mask is not None:
        require_same_shape(values=values, mask=mask)
        values = torch.where(mask, values, 0.0)
        old_values = torch.where(mask, old_values, 0.0)
        returns = torch.where(mask, returns, 0.0)
    limit = torch.as_tensor(clip, dtype=values.dtype, device=values.device)
    clipped = old_values + (values - old_values).clamp(-limit, limit)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def clip_fraction(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, clip: float) -> Tensor:
    """Share of response tokens, a scalar in [0, 1], whose ratio has left [1 - clip, 1 + clip].

    Counts both directions, those in which the loss still has a gradient among them.
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    ratio = (logprobs.detach() - old_logprobs).exp()
    return masked_mean(((ratio - 1).abs() > clip).to(ratio.dtype), mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over response tokens, a scalar.

    1: the critic predicts every return; 0: no better than a constant; negative: worse than that.
    NaN where the returns do not vary, since there is nothing to explain.
    """
    require_same_shape(values=values, returns=returns, mask=mask)
    unexplained, total = _variance(returns - values.detach(), mask), _variance(returns, mask)
    return torch.where(total > 0, 1 - unexplained / total, torch.nan)


def _variance(x: Tensor, mask: Tensor) -> Tensor:
    return masked_mean((x - masked_mean(x, mask)).square(), mask)
