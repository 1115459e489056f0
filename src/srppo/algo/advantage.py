"""How much better than expected each token was: GAE, and the leave-one-out baseline."""

import torch
from torch import Tensor

from srppo.algo.masking import require_right_padded, require_same_shape
from srppo.errors import ShapeError


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, both (B, T), zero at padding; responses are right-padded.

    delta_t = r_t + gamma V_{t+1} - V_t      V = 0 after the last response token
    A_t     = delta_t + gamma lam A_{t+1}    arXiv:1506.02438, eq. 16 as a recursion

    Args:
        rewards: (B, T), from `token_rewards`.
        values: (B, T), V of the prefix before token t, in the units of the rewards.
        mask: (B, T) bool, True at response tokens.
        gamma: discount per token, in [0, 1].
        lam: weight of longer look-ahead, in [0, 1]: 0 is one-step, 1 is Monte Carlo.

    Returns:
        A_t, and the critic's target A_t + V_t.

    Raises:
        ShapeError: shapes differ, or a row is not right-padded.
    """
    require_same_shape(rewards=rewards, values=values, mask=mask)
    require_right_padded(mask)
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * lam * next_advantage
        advantages[:, t], next_value = next_advantage, values[:, t]
    return advantages, advantages + values


def leave_one_out(returns: Tensor, group_size: int) -> Tensor:
    """Each response's return minus the mean return of the others for the same prompt (RLOO).

    A_i = R_i - (sum_{j != i} R_j) / (k - 1) = (R_i - mean R) k / (k - 1)    arXiv:2402.14740

    Args:
        returns: (N,), groups are consecutive: rows 0..k-1 answer the first prompt.
        group_size: k, responses per prompt, at least 2.

    Returns:
        (N,), of sum zero in each group.

    Raises:
        ShapeError: k < 2, or N is not a multiple of k.
    """
    if group_size < 2 or len(returns) % group_size:
        raise ShapeError(
            f"{len(returns)} returns cannot be split into groups of {group_size}: the baseline is "
            "the mean of the other responses to the same prompt. Sample at least two responses "
            "for each prompt and keep every group whole."
        )
    groups = returns.view(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    return (centred * group_size / (group_size - 1)).flatten()
