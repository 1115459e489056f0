"""The coherent reward log pi_sft - log pi_base, the KL penalty, and where the credit goes."""

from typing import Literal

import torch
from torch import Tensor

from srppo.algo.masking import masked_sum, require_right_padded, require_same_shape
from srppo.errors import ConfigError, ShapeError


def log_ratio_reward(sft_logprobs: Tensor, base_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Self-reward of each response: log pi_sft(y|x) - log pi_base(y|x).

    Args:
        sft_logprobs: (B, T) nats, log pi_sft(y_t | x, y_<t) at temperature 1.
        base_logprobs: (B, T) nats, the same tokens under pi_base.
        mask: (B, T) bool, True at response tokens.

    Returns:
        (B,) nats. A sum, not a mean: a log likelihood ratio, so its size grows with length.

    Raises:
        ShapeError: the three shapes differ.

    Source: arXiv:2510.21090.
    """
    return token_log_ratios(sft_logprobs, base_logprobs, mask).sum(dim=1)


def token_log_ratios(
    sft_logprobs: Tensor, base_logprobs: Tensor, mask: Tensor, clip: float | None = None
) -> Tensor:
    """Each token's term of the self-reward: log pi_sft(y_t|..) - log pi_base(y_t|..).

    Args:
        sft_logprobs: (B, T) nats, at temperature 1.
        base_logprobs: (B, T) nats, the same tokens under pi_base.
        mask: (B, T) bool, True at response tokens.
        clip: nats; each term is held in [-clip, clip], so that no single token to which pi_base
            gives almost no probability dominates the sum. None: no clipping, as the paper.

    Returns:
        (B, T) nats, zero at padding.

    Raises:
        ShapeError: the three shapes differ.
    """
    require_same_shape(sft_logprobs=sft_logprobs, base_logprobs=base_logprobs, mask=mask)
    log_ratios = torch.where(mask, sft_logprobs - base_logprobs, 0.0)
    return log_ratios if clip is None else log_ratios.clamp(-clip, clip)


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
