"""The all-action estimator in the trainer: what both frozen models say about every token.

Their distributions over the vocabulary are needed twice, before the update and in it, and are too
large to keep: kept are the hidden states that the output heads read, and of the distributions only
those of one chunk of tokens exist at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from srppo import distributed
from srppo.algo.all_action import expected_gain, soft_rewards
from srppo.algo.logprobs import token_logprobs, token_margins
from srppo.config import PPOConfig
from srppo.models.batching import Batch, Sequences, microbatches
from srppo.models.roles import Roles
from srppo.models.scoring import chunks, hidden_states, output_logits, response_states
from srppo.train.reward import bounds_of


@dataclass(frozen=True)
class FrozenStates:
    """What pi_sft and pi_base know of a rollout; M response tokens in all, on the CPU."""

    places: Tensor
    """(N, T) int64, each response token's row below."""
    sft: Tensor
    """(M, H)"""
    base: Tensor
    """(M, H)"""

    def logits(self, roles: Roles, batch: Batch, some: slice) -> tuple[Tensor, Tensor]:
        """(n, V) of pi_sft and of pi_base, for a chunk of a batch's response tokens."""
        rows = self.places[batch.rows][batch.mask][some]
        # The reward keeps its own precision, whatever the update multiplies in.
        with torch.no_grad(), torch.autocast(batch.response_ids.device.type, enabled=False):
            return (
                output_logits(roles.sft.model, self.sft[rows].to(roles.sft.device)),
                output_logits(roles.base.model, self.base[rows].to(roles.base.device)),
            )

    def soft_rewards(self, roles: Roles, batch: Batch, some: slice, config: PPOConfig) -> Tensor:
        """(n, V) nats, the reward of every token; see srppo.algo.all_action."""
        sft, base = self.logits(roles, batch, some)
        return soft_rewards(sft, base, config.beta, config.kl_ref, bounds_of(config))


def frozen_states(roles: Roles, y: Sequences, max_tokens: int) -> FrozenStates:
    """One pass of each frozen model."""
    places = (y.mask.flatten().cumsum(0) - 1).view(y.mask.shape)
    sft, base = (response_states(role, y, max_tokens) for role in (roles.sft, roles.base))
    return FrozenStates(places, sft, base)


@torch.no_grad()
def score_all_actions(
    roles: Roles, y: Sequences, frozen: FrozenStates, config: PPOConfig
) -> list[Tensor]:
    """Of the sampled tokens log pi_theta, log pi_sft, log pi_base and pi_sft's `token_margins`, and
    of each state the `expected_gain`; (N, T) float32 nats on the CPU, zero at padding."""
    every = list(torch.zeros(5, *y.mask.shape))
    rows = torch.arange(len(y))
    with roles.policy.active() as model:
        for batch in microbatches(y, rows, config.max_tokens_per_batch, roles.policy.device):
            hidden = hidden_states(model, batch)
            parts = []
            for some in chunks(model, batch):
                ids, logits = batch.response_ids[some], output_logits(model, hidden[some])
                sft_logits, base_logits = frozen.logits(roles, batch, some)
                soft = soft_rewards(
                    sft_logits, base_logits, config.beta, config.kl_ref, bounds_of(config)
                )
                parts.append(
                    torch.stack(
                        [
                            *(token_logprobs(x, ids) for x in (logits, sft_logits, base_logits)),
                            token_margins(sft_logits, ids),
                            expected_gain(logits, soft, config.beta),
                        ]
                    )
                )
            found = torch.cat(parts, dim=1)
            for into, values in zip(every, found, strict=True):
                batch.put(into, values)
    distributed.add(every)
    return every
