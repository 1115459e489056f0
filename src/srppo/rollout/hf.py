"""Sampling with transformers: one KV cache, and finished responses leave the batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from srppo.algo.optimum import extrapolate
from srppo.errors import ModelError
from srppo.models.batching import Sequences, pad_left, positions
from srppo.rollout.sampler import Rollout

Progress = Callable[[int], None]


class HFSampler:
    """Samples from one model, or from two by extrapolation, token by token.

    Randomness is one uniform number per response and position, drawn before anything else, and
    inverted through the cumulative distribution: what a response becomes depends on the seed and
    its place in the list, not on how the list is cut into batches.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_token_id: int,
        max_new_tokens: int,
        max_tokens_per_batch: int = 65536,
        base: PreTrainedModel | None = None,
        lam: float = 1.0,
    ) -> None:
        """With `base`, samples base·(model/base)^lam per token (decode-time extrapolation)."""
        self.models = [model] if base is None else [base, model]
        self.eos_token_id = eos_token_id
        self.max_new_tokens = max_new_tokens
        self.max_tokens_per_batch = max_tokens_per_batch
        self.lam = lam

    def sample(
        self,
        prompts: list[list[int]],
        seed: int,
        temperature: float = 1.0,
        progress: Progress = lambda n: None,
    ) -> Rollout:
        """One response to each prompt; temperature 0 is greedy. `progress` counts responses."""
        N, T = len(prompts), self.max_new_tokens
        uniforms = torch.rand(N, T, generator=torch.Generator().manual_seed(seed))
        ids = torch.zeros(N, T, dtype=torch.int64)
        logprobs = torch.zeros(N, T)
        lengths = torch.zeros(N, dtype=torch.int64)
        order = sorted(range(N), key=lambda i: (len(prompts[i]), i))
        while order:
            width = T + len(prompts[order[-1]])  # the longest of those that remain
            rows = torch.tensor(order[-max(1, self.max_tokens_per_batch // width) :])
            del order[-len(rows) :]
            some = [prompts[i] for i in rows.tolist()]
            ids[rows], logprobs[rows], lengths[rows] = self._decode(
                some, uniforms[rows], temperature
            )
            progress(len(rows))
        longest = int(lengths.max())
        mask = torch.arange(longest) < lengths[:, None]
        ended = ids[torch.arange(N), lengths - 1] == self.eos_token_id
        sequences = Sequences(prompts, ids[:, :longest], mask)
        return Rollout(sequences, logprobs[:, :longest], ended)

    @torch.no_grad()
    def _decode(
        self, prompts: list[list[int]], uniforms: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Ids (b, T), log-probabilities (b, T), lengths (b,), on the CPU."""
        device = self.models[0].device
        uniforms = uniforms.to(device)
        b, T = uniforms.shape
        ids = torch.zeros(b, T, dtype=torch.int64, device=device)
        logprobs = torch.zeros(b, T, device=device)
        lengths = torch.full((b,), T, device=device)
        rows = torch.arange(b, device=device)  # those still running
        step_ids, attention_mask = pad_left(prompts, device)
        caches = [DynamicCache(config=model.config) for model in self.models]
        for t in range(T):
            distribution = self._next(step_ids, attention_mask, caches, temperature)
            chosen = _invert(distribution, uniforms[rows, t], greedy=temperature == 0)
            if int(chosen.max()) >= distribution.shape[1]:
                raise ModelError(
                    "the model gives probabilities that are not numbers (NaN): it cannot be "
                    "sampled from, its training has diverged. Lower the learning rate."
                )
            ids[rows, t] = chosen
            logprobs[rows, t] = distribution.gather(1, chosen[:, None]).squeeze(1)
            going = chosen != self.eos_token_id
            lengths[rows[~going]] = t + 1
            if not going.all():
                keep = going.nonzero().squeeze(1)
                if not len(keep):
                    break
                rows, chosen, attention_mask = rows[keep], chosen[keep], attention_mask[keep]
                for cache in caches:
                    cache.batch_select_indices(keep)
            step_ids = chosen[:, None]
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(rows), 1)], 1)
        return ids.cpu(), logprobs.cpu(), lengths.cpu()

    def _next(
        self, ids: Tensor, attention_mask: Tensor, caches: list[DynamicCache], temperature: float
    ) -> Tensor:
        """(b, V) float32 log-probabilities of the next token."""
        logits = [
            model(
                input_ids=ids,
                attention_mask=attention_mask,
                position_ids=positions(attention_mask)[:, -ids.shape[1] :],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            .logits[:, -1]
            .float()
            for model, cache in zip(self.models, caches, strict=True)
        ]
        combined = logits[0] if len(logits) == 1 else extrapolate(logits[0], logits[1], self.lam)
        return torch.log_softmax(combined / (temperature or 1.0), dim=-1)


def _invert(log_distribution: Tensor, uniforms: Tensor, greedy: bool) -> Tensor:
    """(b,) the token whose share of the cumulative distribution holds the uniform number."""
    if greedy:
        return log_distribution.argmax(-1)
    cumulative = log_distribution.double().exp().cumsum(-1)
    # Scaled by the total, so that rounding cannot push the number past the last token.
    targets = uniforms.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True).squeeze(1)
