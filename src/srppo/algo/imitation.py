"""What other methods put in the place of SFT's loss or of the reward: weights of tokens, losses of
pairs. docs/baselines.md says which method each belongs to.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from srppo.algo.masking import masked_mean, require_same_shape
from srppo.errors import ConfigError

PairLoss = Literal["spin", "logistic", "brier", "hinge", "kliep", "lsif"]

MAX_RESPONSE_WEIGHT = 16.0
"""Bound of a response's weight, of the authors' code."""
MAX_STEP = 0.8
"""How far a token's weight may be from 1, of the authors' code."""


def importance_weights(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, of: Literal["response", "token"]
) -> Tensor:
    """What iw-SFT multiplies each token's -log pi with; without a gradient.

    response: w = min(16, exp(mean_t (log pi - log pi_ref))), the same for all its tokens
    token:    w_t = pi(y_t|..) / pi_ref(y_t|..), held in [0.2, 1.8]

    Args:
        logprobs: (B, T) nats, under the policy in training.
        ref_logprobs: (B, T) nats, the same tokens under pi_ref.
        mask: (B, T) bool, True at response tokens.
        of: whose probability ratio it is.

    Returns:
        (B, T), 1 at padding.

    Raises:
        ShapeError: the three shapes differ.

    Source: arXiv:2507.12856; its bounds, and the mean over tokens instead of the sum, are those of
    the authors' code, github.com/emmyqin/iw_sft.
    """
    require_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask)
    log_ratios = torch.where(mask, logprobs.detach() - ref_logprobs, 0.0)
    if of == "token":
        return log_ratios.exp().clamp(1 - MAX_STEP, 1 + MAX_STEP)
    whole = masked_mean(log_ratios, mask, dim=1).exp().clamp(max=MAX_RESPONSE_WEIGHT)
    return torch.where(mask, whole[:, None], 1.0)


def pair_losses(
    data: Tensor, generated: Tensor, loss: PairLoss, scale: float, shift: float = 0.0
) -> Tensor:
    """How badly f tells a demonstration from the model's own response, to be minimised.

    With f = scale * log(pi/pi_ref) + shift, f+ at the demonstration, f- at the own response:

        spin      -log sigma(f+ - f-)
        logistic  -log sigma(f+) - log sigma(-f-)
        brier     (1 - sigma(f+))^2 + sigma(f-)^2
        hinge     max(0, 1 - f+) + max(0, 1 + f-)
        kliep     -f+ + exp(f-)
        lsif      -exp(f+) + exp(2 f-) / 2

    logistic, brier, kliep and lsif are least where f is the log density ratio of demonstrations to
    own responses. With scale 1 and shift 0 that makes pi what the demonstrations were drawn from.

    Args:
        data: (B,) nats, log pi(y|x) - log pi_ref(y|x) of the demonstrations.
        generated: (B,) nats, the same of the model's own responses.
        loss: one of the above.
        scale: SPIN's lambda, GSIL's alpha; above 0.
        shift: GSIL's beta; it cancels in spin.

    Returns:
        (B,)

    Raises:
        ShapeError: `data` and `generated` differ in shape.
        ConfigError: there is no such loss.

    Source: spin arXiv:2401.01335, eq. 4.7; the others arXiv:2410.10093 as github.com/tengxiao1/GSIL
    has them. spin is the loss of DPO with the demonstration chosen.
    """
    require_same_shape(data=data, generated=generated)
    real, own = scale * data + shift, scale * generated + shift
    if loss == "spin":
        return -F.logsigmoid(real - own)
    if loss == "logistic":
        return -F.logsigmoid(real) - F.logsigmoid(-own)
    if loss == "brier":
        return (1 - real.sigmoid()).square() + own.sigmoid().square()
    if loss == "hinge":
        return (1 - real).clamp(min=0) + (1 + own).clamp(min=0)
    if loss == "kliep":
        return own.exp() - real
    if loss == "lsif":
        return (2 * own).exp() / 2 - real.exp()
    raise ConfigError(
        f"loss={loss!r} is unknown: choose spin, logistic, brier, hinge, kliep or lsif."
    )
