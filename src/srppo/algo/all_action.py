"""Policy gradients over all actions: exact over the vocabulary, sampled only where that pays.

With the KL term in the reward, a token earns g(s, a) = u(s, a) - beta log pi_theta(a|s), and the
frozen models say u for every token of the vocabulary, not only for the one that was sampled:

    u(s, a) = log pi_sft(a|s) - log pi_base(a|s) + beta log pi_ref(a|s)
    gbar(s) = sum_a pi_theta(a|s) g(s, a)

For every share c, with the noise of the sampled reward eps_t = g(s_t, a_t) - gbar(s_t),

    grad J = E sum_t [ (1 - c) sum_a grad pi_theta(a|s_t) g(s_t, a)
                       + grad log pi_theta(a_t|s_t) (c eps_t + F_t - b_t) ]
    F_t    = sum_{k>t} (gbar(s_k) + c eps_k)

c = 0 is the all-action gradient: no noise from a_t in the immediate part. c = 1 is REINFORCE with
the reward to go. What a response earns in all is the same for each at the optimum, so there eps_t
and what comes after cancel: c = 0 would leave half of that pair in. b_t is the mean F_t of other
responses; there is no critic.

Source: Sutton, Singh, McAllester (2001), "Comparing policy-gradient algorithms", and
arXiv:1706.05374 for c = 0; this reward and c: ours, derived in docs/math.md.
"""

from typing import Literal

import torch
from torch import Tensor

from srppo.algo.logprobs import working_dtype
from srppo.algo.loss import clipped_policy_loss
from srppo.algo.masking import require_right_padded, require_same_shape
from srppo.algo.reward import UNBOUNDED, Bounds
from srppo.errors import ConfigError, ShapeError


def soft_rewards(
    sft_logits: Tensor,
    base_logits: Tensor,
    kl_coef: float,
    ref: Literal["sft", "base"],
    bounds: Bounds = UNBOUNDED,
) -> Tensor:
    """u(s, a) = log pi_sft - log pi_base + kl_coef log pi_ref, of every token of the vocabulary.

    The reward of J in its maximum-entropy form, J = E sum_t [u + kl_coef H(pi_theta(.|s_t))].

    Args:
        sft_logits: (n, V), finite, any float type, at temperature 1.
        base_logits: (n, V), finite, of the same prefixes.
        kl_coef: beta.
        ref: which of the two the KL term refers to.
        bounds: of log pi_sft - log pi_base, as `token_log_ratios` has them.

    Returns:
        (n, V) nats, float32 (float64 for float64), without a gradient.

    Raises:
        ShapeError: the two shapes differ.
        ConfigError: `ref` is neither of the two.
    """
    require_same_shape(sft_logits=sft_logits, base_logits=base_logits)
    if ref not in ("sft", "base"):
        raise ConfigError(f"ref={ref!r} is unknown: choose 'sft' or 'base'.")
    with torch.no_grad():
        sft = torch.log_softmax(sft_logits, dim=-1, dtype=working_dtype(sft_logits))
        base = torch.log_softmax(base_logits, dim=-1, dtype=working_dtype(base_logits))
        log_ratios = bounds.apply(sft - base, sft - sft.amax(-1, keepdim=True))
        return log_ratios.add_(sft if ref == "sft" else base, alpha=kl_coef)


def expected_gain(policy_logits: Tensor, soft: Tensor, kl_coef: float) -> Tensor:
    """gbar(s) = sum_a pi_theta(a|s) (u(s, a) - kl_coef log pi_theta(a|s)): what a state earns.

    Its gradient is sum_a grad pi_theta(a|s) g(s, a): -kl_coef sum_a pi_theta grad log pi_theta
    is zero.

    Args:
        policy_logits: (n, V), finite, any float type.
        soft: (n, V) nats, from `soft_rewards`.
        kl_coef: beta.

    Returns:
        (n,) nats, float32 (float64 for float64).

    Raises:
        ShapeError: the two shapes differ.
    """
    require_same_shape(policy_logits=policy_logits, soft=soft)
    logprobs = torch.log_softmax(policy_logits, dim=-1, dtype=working_dtype(policy_logits))
    return _expected_gain(logprobs, soft, kl_coef)


def all_action_advantages(
    gains: Tensor,
    rewards: Tensor,
    mask: Tensor,
    group_size: int,
    share: float,
    gamma: float = 1.0,
    terminal: Tensor | None = None,
) -> Tensor:
    """c eps_t + F_t - b_t: what the sampled token is held to account for.

    Args:
        gains: (..., N, T) nats, gbar(s_t) from `expected_gain`, of the policy that sampled.
        rewards: (..., N, T) nats, g(s_t, a_t), from `token_rewards` with credit "token".
        mask: (..., N, T) bool, True at response tokens, right-padded.
        group_size: responses to each prompt, consecutive rows; at least 1.
        share: c in [0, 1], as in `all_action_loss`.
        gamma: discount per token, in [0, 1]; below 1 the gradient is biased.
        terminal: (..., N) nats, see `future_gains`.

    Returns:
        (..., N, T) nats, zero at padding.

    Raises:
        ShapeError: shapes differ, a row is not right-padded, or groups of that size cannot be.
    """
    require_same_shape(gains=gains, rewards=rewards, mask=mask)
    noise = torch.where(mask, share * (rewards - gains), 0.0)
    future = future_gains(gains + noise, mask, gamma, terminal)
    return noise + leave_one_out_per_token(future, mask, group_size)


def future_gains(
    gains: Tensor, mask: Tensor, gamma: float = 1.0, terminal: Tensor | None = None
) -> Tensor:
    """F_t = sum_{k>t} gamma^(k-t) gains_k: what is earned after token t.

    Args:
        gains: (..., T) nats.
        mask: (..., T) bool, True at response tokens, right-padded.
        gamma: discount per token, in [0, 1].
        terminal: (...) nats, earned with the last token and unknown to g, such as
            -missing_eos_penalty of a response that was cut off. It stays sampled: it is in every
            F_t, the last token's included.

    Returns:
        (..., T) nats, zero at padding.

    Raises:
        ShapeError: shapes differ, or a row is not right-padded.
    """
    require_same_shape(gains=gains, mask=mask)
    require_right_padded(mask.flatten(0, -2))
    gains = torch.where(mask, gains, 0.0)
    future = torch.zeros_like(gains)
    after = future[..., 0] if terminal is None else terminal.to(gains.dtype)
    for t in reversed(range(gains.shape[-1])):
        future[..., t] = torch.where(mask[..., t], after, 0.0)
        after = torch.where(mask[..., t], gamma * (gains[..., t] + after), after)
    return future


def leave_one_out_per_token(future: Tensor, mask: Tensor, group_size: int) -> Tensor:
    """F_t - b_t with b_t the mean over the prompt's other responses, shrunk towards the batch's.

    b_t = (sum of F_t over the others of the group + mean of F_t over all others) / (n + 1)

    with n others of the group that have a token t: the mean over the whole batch counts as one
    more response. No other response depends on y_i, so the gradient stays unbiased. Where none in
    the batch is as long, nothing is subtracted.

    Args:
        future: (..., N, T) nats, from `future_gains`; groups are consecutive rows of N.
        mask: (..., N, T) bool, True at response tokens.
        group_size: responses to each prompt, at least 1.

    Returns:
        (..., N, T) nats, zero at padding.

    Raises:
        ShapeError: shapes differ, or N is not a multiple of the size.
    """
    require_same_shape(future=future, mask=mask)
    N = future.shape[-2]
    if group_size < 1 or N % group_size:
        raise ShapeError(
            f"{N} responses cannot be split into groups of {group_size}: the baseline is over the "
            "other responses to the same prompt. Keep every group whole."
        )
    future = torch.where(mask, future, 0.0)
    batch_sum, batch_n = _others(future, mask, N)
    group_sum, group_n = _others(future, mask, group_size)
    baseline = (group_sum + batch_sum / batch_n.clamp(min=1)) / (group_n + 1)
    return torch.where(mask, future - baseline, 0.0)


def _others(x: Tensor, mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Sum of `x` over the others of each row's group, token by token, and how many those are."""
    groups, present = (y.unflatten(-2, (-1, size)) for y in (x, mask.to(x.dtype)))
    sums, counts = (y.sum(-2, keepdim=True) - y for y in (groups, present))
    return sums.view_as(x), counts.view_as(x)


def all_action_loss(
    policy_logits: Tensor,
    soft: Tensor,
    ids: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    kl_coef: float,
    share: float,
    clip: float,
) -> Tensor:
    """-(1 - c) gbar(s_t) - min(ratio A_t, clamp(ratio, 1 - clip, 1 + clip) A_t), per token.

    Where the policy is still the one that sampled, its gradient is that of -J (see above). Later
    in the update, gbar is of the policy as it is now; what is neglected is that the states are
    those of the old policy, as in PPO, and what `clip` cuts off.

    Args:
        policy_logits: (n, V), finite, any float type; the gradient flows here.
        soft: (n, V) nats, from `soft_rewards`.
        ids: (n,) int64, the sampled tokens.
        old_logprobs: (n,) nats, of these tokens under the policy that sampled.
        advantages: (n,) nats, from `all_action_advantages`; not whitened, they add up with gbar.
        kl_coef: beta.
        share: c in [0, 1].
        clip: how far the ratio may gain from leaving 1.

    Returns:
        (n,) nats, float32 (float64 for float64).

    Raises:
        ShapeError: shapes differ.
    """
    require_same_shape(policy_logits=policy_logits, soft=soft)
    require_same_shape(ids=ids, old_logprobs=old_logprobs, advantages=advantages)
    logprobs = torch.log_softmax(policy_logits, dim=-1, dtype=working_dtype(policy_logits))
    chosen = logprobs.gather(1, ids[:, None]).squeeze(1)
    sampled = clipped_policy_loss(chosen, old_logprobs, advantages, clip)
    return sampled - (1 - share) * _expected_gain(logprobs, soft, kl_coef)


def _expected_gain(logprobs: Tensor, soft: Tensor, kl_coef: float) -> Tensor:
    return (logprobs.exp() * (soft - kl_coef * logprobs.detach())).sum(dim=-1)
