"""The coherent reward log pi_sft - log pi_base, the KL penalty, and where the credit goes."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from srppo.algo.masking import masked_sum, require_right_padded, require_same_shape
from srppo.errors import ConfigError, ShapeError


@dataclass(frozen=True)
class Bounds:
    """What one token may add to the self-reward. By default anything, as in the paper; both ours.

    Raises:
        ConfigError: a bound that is not positive, or a plausibility above 1.
    """

    clip: float | None = None
    """Nats; each term is held in [-clip, clip], so that no single token to which pi_base gives
    almost no probability dominates the sum."""
    plausibility: float | None = None
    """alpha: where pi_sft(a) < alpha max pi_sft, the ratio of two small numbers is noise. Such a
    token earns log(pi_sft(a) / (alpha max pi_sft)) < 0 instead. Contrastive decoding
    (arXiv:2210.15097, eq. 2) leaves those tokens out."""

    def __post_init__(self) -> None:
        if self.clip is not None and not self.clip > 0:
            raise ConfigError(f"clip={self.clip}: no token would earn anything. Set it above 0.")
        if self.plausibility is not None and not 0 < self.plausibility <= 1:
            raise ConfigError(
                f"plausibility={self.plausibility} is no share of the likeliest token's "
                "probability. Set it above 0, and to 1 at most; 0.1, say."
            )

    def apply(self, log_ratios: Tensor, margins: Tensor | None) -> Tensor:
        """`log_ratios` (...) nats, bounded; `margins` (...), log pi_sft(a) - max log pi_sft, nats,
        are read where plausibility is set only."""
        if self.plausibility is not None:
            assert margins is not None
            below = margins - math.log(self.plausibility)
            log_ratios = torch.where(below < 0, below, log_ratios)
        return log_ratios if self.clip is None else log_ratios.clamp(-self.clip, self.clip)


UNBOUNDED = Bounds()


def token_log_ratios(
    sft_logprobs: Tensor,
    base_logprobs: Tensor,
    mask: Tensor,
    bounds: Bounds = UNBOUNDED,
    margins: Tensor | None = None,
) -> Tensor:
    """Each token's term of the self-reward: log pi_sft(y_t|..) - log pi_base(y_t|..).

    Their sum over a response is its reward, log pi_sft(y|x) - log pi_base(y|x): a sum, not a mean,
    so its size grows with length.

    Args:
        sft_logprobs: (B, T) nats, at temperature 1.
        base_logprobs: (B, T) nats, the same tokens under pi_base.
        mask: (B, T) bool, True at response tokens.
        bounds: of each term.
        margins: (B, T) nats, at most 0, log pi_sft(y_t|..) - max_a log pi_sft(a|..); a bound of
            plausibility needs them.

    Returns:
        (B, T) nats, zero at padding.

    Raises:
        ShapeError: the three shapes differ.

    Source: arXiv:2510.21090; the bounds are ours.
    """
    require_same_shape(sft_logprobs=sft_logprobs, base_logprobs=base_logprobs, mask=mask)
    return torch.where(mask, bounds.apply(sft_logprobs - base_logprobs, margins), 0.0)


def last_token(mask: Tensor) -> Tensor:
    """Index (B,) of each row's last response token: its EOS, or where it was truncated.

    Raises:
        ShapeError: a row of `mask` (B, T) has no response token, or is not right-padded.
    """
    require_right_padded(mask)
    lengths = mask.sum(dim=1)
    if (lengths == 0).any():
        row = int((lengths == 0).int().argmax())
        raise ShapeError(
            f"mask row {row} has no response token, so there is nothing to reward. "
            "Drop empty responses; an immediate EOS counts as one token."
        )
    return lengths - 1


def token_rewards(
    log_ratios: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    kl_coef: float,
    credit: Literal["eos", "token"],
) -> Tensor:
    """Reward of each token: its credit minus kl_coef (log pi_theta(y_t) - log pi_ref(y_t)).

    Args:
        log_ratios: (B, T) nats, from `token_log_ratios`.
        logprobs: (B, T) nats, the sampled tokens under the policy that sampled them.
        ref_logprobs: (B, T) nats, the same tokens under pi_ref.
        mask: (B, T) bool, True at response tokens, right-padded.
        kl_coef: beta, the price of one nat of divergence from pi_ref.
        credit: "eos" pays the response's whole log-ratio at its last token, "token" pays each
            token its own. The sum over tokens is the same.

    Returns:
        (B, T) nats, zero at padding. Summed over T, its mean over samples of the policy
        estimates J.

    Raises:
        ShapeError: shapes differ, or with credit "eos" a row is empty or not right-padded.
        ConfigError: `credit` is neither of the two.
    """
    require_same_shape(
        log_ratios=log_ratios, logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask
    )
    penalty = torch.where(mask, kl_coef * (logprobs - ref_logprobs), 0.0)
    if credit == "token":
        return torch.where(mask, log_ratios, 0.0) - penalty
    if credit == "eos":
        score = masked_sum(log_ratios, mask, dim=1)
        return (-penalty).scatter_add(1, last_token(mask)[:, None], score[:, None])
    raise ConfigError(f"credit={credit!r} is unknown: choose 'eos' or 'token'.")
