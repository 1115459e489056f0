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
from srppo.errors import ConfigError, ShapeError


def soft_rewards(
    sft_logits: Tensor,
    base_logits: Tensor,
    kl_coef: float,
    ref: Literal["sft", "base"],
    token_clip: float | None = None,
) -> Tensor:
    """u(s, a) = log pi_sft - log pi_base + kl_coef log pi_ref, of every token of the vocabulary.

    The reward of J in its maximum-entropy form, J = E sum_t [u + kl_coef H(pi_theta(.|s_t))].

    Args:
        sft_logits: (n, V), finite, any float type, at temperature 1.
        base_logits: (n, V), finite, of the same prefixes.
        kl_coef: beta.
        ref: which of the two the KL term refers to.
        token_clip: nats; bounds log pi_sft - log pi_base as `token_log_ratios` does.

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
        log_ratios = sft - base
        if token_clip is not None:
            log_ratios.clamp_(-token_clip, token_clip)
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
        gains: (N, T) nats, gbar(s_t) from `expected_gain`, of the policy that sampled.
        rewards: (N, T) nats, g(s_t, a_t), from `token_rewards` with credit "token".
        mask: (N, T) bool, True at response tokens, right-padded.
        group_size: b_t is over the others of each so many consecutive rows: the responses to one
            prompt, or all of a batch.
        share: c in [0, 1], as in `all_action_loss`.
        gamma: discount per token, in [0, 1]; below 1 the gradient is biased.
        terminal: (N,) nats, see `future_gains`.

    Returns:
        (N, T) nats, zero at padding.

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
        gains: (N, T) nats.
        mask: (N, T) bool, True at response tokens, right-padded.
        gamma: discount per token, in [0, 1].
        terminal: (N,) nats, earned with the last token and unknown to g, such as
            -missing_eos_penalty of a response that was cut off. It stays sampled: it is in every
            F_t, the last token's included.

    Returns:
        (N, T) nats, zero at padding.

    Raises:
        ShapeError: shapes differ, or a row is not right-padded.
    """
    require_same_shape(gains=gains, mask=mask)
    require_right_padded(mask)
    gains = torch.where(mask, gains, 0.0)
    future = torch.zeros_like(gains)
    after = future[:, 0] if terminal is None else terminal.to(gains.dtype)
    for t in reversed(range(gains.shape[1])):
        future[:, t] = torch.where(mask[:, t], after, 0.0)
        after = torch.where(mask[:, t], gamma * (gains[:, t] + after), after)
    return future


def leave_one_out_per_token(future: Tensor, mask: Tensor, group_size: int) -> Tensor:
    """F_t minus the mean F_t of the group's other responses that have a token t.

    The others do not depend on y_i, so the gradient stays unbiased. Where no other response is
    as long, nothing is subtracted.

    Args:
        future: (N, T) nats, from `future_gains`; groups are consecutive rows.
        mask: (N, T) bool, True at response tokens.
        group_size: at least 2.

    Returns:
        (N, T) nats, zero at padding.

    Raises:
        ShapeError: shapes differ, groups of one, or N is not a multiple of the size.
    """
    require_same_shape(future=future, mask=mask)
    if group_size < 2 or len(future) % group_size:
        raise ShapeError(
            f"{len(future)} responses cannot be split into groups of {group_size}: the baseline "
            "is the mean of a group's other responses. Use groups of at least two, all whole."
        )
    future = torch.where(mask, future, 0.0)
    groups = future.view(-1, group_size, future.shape[1])
    others = mask.view_as(groups).sum(dim=1, keepdim=True) - 1
    baseline = (groups.sum(dim=1, keepdim=True) - groups) / others.clamp(min=1)
    return torch.where(mask, future - baseline.view_as(future), 0.0)


def all_action_loss(
    policy_logits: Tensor,
    soft: Tensor,
    ids: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    kl_coef: float,
    clip: float,
) -> tuple[Tensor, Tensor]:
    """-gbar(s_t) - min(ratio A_t, clamp(ratio) A_t): its gradient is the estimator, per token.

    At the policy that sampled, the gradient is exact in expectation. Later in an update both parts
    are surrogates, as PPO's: the states are still those of the old policy.

    Args:
        policy_logits: (n, V), finite, any float type; the gradient flows here.
        soft: (n, V) nats, from `soft_rewards`.
        ids: (n,) int64, the sampled tokens.
        old_logprobs: (n,) nats, the sampled tokens under the policy that sampled them.
        advantages: (n,) nats, of what comes after each token.
        kl_coef: beta.
        clip: PPO's epsilon, for the sampled part.

    Returns:
        The loss, and log pi_theta of the sampled tokens; (n,) each.

    Raises:
        ShapeError: shapes differ.
    """
    require_same_shape(policy_logits=policy_logits, soft=soft)
    require_same_shape(ids=ids, old_logprobs=old_logprobs, advantages=advantages)
    logprobs = torch.log_softmax(policy_logits, dim=-1, dtype=working_dtype(policy_logits))
    chosen = logprobs.gather(1, ids[:, None]).squeeze(1)
    sampled = clipped_policy_loss(chosen, old_logprobs, advantages, clip)
    return sampled - _expected_gain(logprobs, soft, kl_coef), chosen


def _expected_gain(logprobs: Tensor, soft: Tensor, kl_coef: float) -> Tensor:
    return (logprobs.exp() * (soft - kl_coef * logprobs.detach())).sum(dim=-1)
