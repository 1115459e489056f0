"""Whether a model can be scored and sampled at all, known before anything is trained."""

from __future__ import annotations

import torch
from torch import Tensor

from srppo.algo.logprobs import token_logprobs
from srppo.errors import ModelError
from srppo.models.batching import Sequences
from srppo.models.roles import Role
from srppo.models.scoring import rounding, score
from srppo.rollout.hf import HFSampler

NEVER = -1
"""No token's id: responses go on to the limit."""
PADDED, ALIKE = [[1], [2, 3, 1, 2], [3, 1], [1, 3, 2]], [[1, 2, 3], [2, 3, 1]]
"""Prompts that are padded, and that need no mask."""


def check_passes(role: Role) -> None:
    """Hold what is taken apart (trunk and head, padding, caches that rows leave) against the
    model's own forward pass on a few tokens. All processes call it together.

    Raises:
        ModelError: they disagree, so that rewards or rollouts would be another model's.
    """
    sampler = HFSampler(role, eos_token_id=NEVER, max_new_tokens=6, stop=_first_leaves)
    for prompts in PADDED, ALIKE:
        rollout = sampler.sample(prompts, seed=0)
        y = rollout.sequences
        scored = score(role, y, max_tokens=10**6)
        with role.active() as model:
            own = _logprobs(model, y)
            for what, logprobs in (("scored", scored), ("sampled from", rollout.logprobs)):
                off = float((logprobs - own).abs()[y.mask].mean())
                if not off <= rounding(model):  # NaN is no less
                    raise ModelError(
                        f"{type(model).__name__} cannot be {what} here: the log-probabilities are "
                        f"{off:.2g} nats a token away from those of its own forward pass, so they "
                        "would be another model's. Take a model of another architecture."
                    )


def _first_leaves(ids: Tensor) -> Tensor:
    """(b,) the first row has ended after its third token."""
    return torch.arange(len(ids), device=ids.device) < int(ids.shape[1] == 3)


@torch.no_grad()
def _logprobs(model: torch.nn.Module, y: Sequences) -> Tensor:
    """(N, T) by the model's own forward, each sequence by itself: no padding, no cache."""
    logprobs = torch.zeros(y.mask.shape)
    device = next(model.parameters()).device
    for i, prompt in enumerate(y.prompt_ids):
        response = y.response_ids[i][y.mask[i]].to(device)
        ids = torch.cat([torch.tensor(prompt, device=device), response])
        logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        logprobs[i][y.mask[i]] = token_logprobs(logits, response).cpu()
    return logprobs
