"""Sampler and trainer run one model with another arithmetic: weights that undo the difference."""

import torch
from torch import Tensor

from srppo.algo.masking import require_same_shape


def importance_weights(
    logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, cap: float
) -> Tensor:
    """min(pi_trainer / pi_sampler, cap) of each sampled token; no gradient flows through it.

    With q the sampler and p the trainer at one state, E_q[min(p/q, cap) f] is

        E_p[f] - sum_{a: p(a) > cap q(a)} (p(a) - cap q(a)) f(a):

    exact as long as no ratio exceeds the cap; beyond it, the variance that a token costs which the
    sampler hardly ever gives is bounded, and the tokens it undervalues count too little. The
    states remain those that the sampler visits.

    Args:
        logprobs: (B, T) nats, by the trainer, of the tokens that were sampled.
        sampler_logprobs: (B, T) nats, by the sampler.
        mask: (B, T) bool, True at response tokens.
        cap: at least as large as the ratios that rounding alone makes.

    Returns:
        (B, T), one at padding.

    Raises:
        ShapeError: shapes differ.

    Source: truncated importance sampling, Ionides, J. Comput. Graph. Stat. 17(2), 2008; per token
    as TRL 1.16's vllm_importance_sampling_mode=token_truncate and verl's rollout_is=token.
    """
    require_same_shape(logprobs=logprobs, sampler_logprobs=sampler_logprobs, mask=mask)
    log_ratios = torch.where(mask, logprobs.detach() - sampler_logprobs, 0.0)
    return log_ratios.exp().clamp(max=cap).where(mask, 1.0)
