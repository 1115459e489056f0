"""Per-token estimates of KL(policy || ref) from tokens that the policy sampled.

With r = ref / policy at the sampled token (http://joschu.net/blog/kl-approx.html):

    k1 = -log r             unbiased, any sign
    k2 = (log r)^2 / 2      biased, never negative, low variance
    k3 = (r - 1) - log r    unbiased, never negative, low variance

Each takes log-probabilities in nats, all of one shape, and returns nats in that shape. They are
measurements: the gradient of an unbiased estimate is not the gradient of the KL. Padding stays
padding: reduce with `masked_mean`.
"""

import torch
from torch import Tensor

from srppo.algo.masking import require_same_shape


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The log-ratio itself, log policy - log ref: unbiased; its sum is the sequence log-ratio."""
    require_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Half the squared log-ratio: never negative; biased at third order in the log-ratio."""
    return 0.5 * k1(logprobs, ref_logprobs).square()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Ratio minus one minus log-ratio: unbiased, never negative."""
    log_ratio = -k1(logprobs, ref_logprobs)
    return torch.expm1(log_ratio) - log_ratio
