"""Sampling with transformers: one KV cache, and finished responses leave the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import DynamicCache, PreTrainedModel

from srppo import distributed
from srppo.algo.optimum import extrapolate
from srppo.algo.reward import UNBOUNDED, Bounds
from srppo.errors import ModelError
from srppo.models.batching import Sequences
from srppo.models.memory import Budget
from srppo.models.precision import Compute, computing
from srppo.models.roles import Role
from srppo.models.scoring import output_logits, trunk_states
from srppo.models.sharding import needs_all
from srppo.models.value_head import ValueHead
from srppo.rollout.cache import growing_cache, keep_rows, without
from srppo.rollout.sampler import Rollout, Sampler

Progress = Callable[[int], None]
Stop = Callable[[Tensor], Tensor]
"""(b, t) response ids so far -> (b,) bool, on the same device: the rows that end here."""


class HFSampler(Sampler):
    """Samples from one model, or from two by extrapolation, token by token.

    Randomness is one uniform number per response and position, drawn before anything else, and
    inverted through the cumulative distribution: what a response becomes depends on the seed and
    its place in the list, not on how the list is cut into batches or dealt out to processes. Every
    process returns the whole rollout.
    """

    def __init__(
        self,
        model: Role | PreTrainedModel,
        *,
        eos_token_id: int,
        max_new_tokens: int,
        max_tokens_per_batch: int | Budget = 65536,
        base: Role | PreTrainedModel | None = None,
        lam: float = 1.0,
        bounds: Bounds = UNBOUNDED,
        critic: ValueHead | None = None,
        compute: Compute = "float32",
        stop: Stop | None = None,
    ) -> None:
        """With `base`, samples base·(model/base)^lam per token (decode-time extrapolation), what
        `extrapolate` makes of it with `bounds`.

        With `critic`, a head on this model's hidden states, rollouts carry its values. With `stop`,
        responses end where it says so, too.
        """
        self.models = [Role.of(m) for m in (base, model) if m is not None]
        self.critic = critic
        self.compute: Compute = compute
        self.eos_token_id = eos_token_id
        self.max_new_tokens = max_new_tokens
        self.budget = Budget.of(max_tokens_per_batch)
        self.lam = lam
        self.bounds = bounds
        self.stop = stop
        self.in_step = any(needs_all(role.model) for role in self.models)
        """Whether all processes take part in every pass of any."""

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
        logprobs, units = torch.zeros(2, N, T)
        lengths = torch.zeros(N, dtype=torch.int64)
        ended = torch.zeros(N, dtype=torch.bool)
        mine = distributed.shares([len(p) for p in prompts])[distributed.rank()]
        order = sorted(mine, key=lambda i: (len(prompts[i]), i))
        with ExitStack() as stack:
            for model in self.models:  # once for all decoding, not for every token
                stack.enter_context(model.decoding())
            stack.enter_context(computing(self.compute, self.models[0].device))
            while order:
                width = T + len(prompts[order[-1]])  # the longest of those that remain

                def decode(tokens: int, width: int = width) -> Tensor:
                    rows = torch.tensor(order[-max(1, tokens // width) :])
                    some = [prompts[i] for i in rows.tolist()]
                    ids[rows], logprobs[rows], units[rows], lengths[rows], ended[rows] = (
                        self._decode(some, uniforms[rows], temperature)
                    )
                    return rows

                rows = self.budget.fit(decode)
                del order[-len(rows) :]
                progress(len(rows))
            while self.in_step and distributed.any_of(False):  # while others decode
                self._take_part()
        ends = ended.long()
        distributed.add([ids, logprobs, units, lengths, ends])
        progress(N - len(mine))
        longest = int(lengths.max())
        mask = torch.arange(longest) < lengths[:, None]
        return Rollout(
            Sequences(prompts, ids[:, :longest], mask),
            logprobs[:, :longest],
            ends.bool(),
            exact=temperature == 1 and len(self.models) == 1 and self._in_float32,
            value_units=units[:, :longest] if self.critic else None,
        )

    @property
    def _in_float32(self) -> bool:
        """Otherwise cached decoding and a pass over the whole response round differently, which
        the KL term would take for a difference of models. (On a CPU `computing` reduces training
        alone. 8-bit products round their inputs row by row.)"""
        role = self.models[-1]
        only_training = role.device.type == "cpu" and not isinstance(role.model, FSDPModule)
        in_8_bit = getattr(role.model, "is_loaded_in_8bit", False)
        as_weights = self.compute == "float32" or only_training
        return as_weights and role.model.dtype == torch.float32 and not in_8_bit

    @torch.no_grad()
    def _decode(
        self, prompts: list[list[int]], uniforms: Tensor, temperature: float
    ) -> tuple[Tensor, ...]:
        """Ids, log-probabilities, the critic's units (b, T); lengths, ended (b,); on the CPU."""
        device = self.models[0].device
        uniforms = uniforms.to(device)
        b, T = uniforms.shape
        ids = torch.zeros(b, T, dtype=torch.int64, device=device)
        logprobs, units = torch.zeros(2, b, T, device=device)
        lengths = torch.full((b,), T, device=device)
        ended = torch.zeros(b, dtype=torch.bool, device=device)
        rows = torch.arange(b, device=device)  # those still running
        step_ids, attention_mask = pad_left(prompts, device)
        caches = [growing_cache(model.config) for model in self.models]
        for t in range(T):
            if self.in_step:
                distributed.any_of(True)
            hidden = self._hidden(step_ids, attention_mask, caches)
            distribution = self._distribution(hidden, temperature)
            chosen = _invert(distribution, uniforms[rows, t], greedy=temperature == 0)
            if int(chosen.max()) >= distribution.shape[1]:
                raise ModelError(
                    "the model gives probabilities that are not numbers (NaN): it cannot be "
                    "sampled from, its training has diverged. Lower the learning rate."
                )
            ids[rows, t] = chosen
            logprobs[rows, t] = distribution.gather(1, chosen[:, None]).squeeze(1)
            if self.critic:
                units[rows, t] = self.critic.units(hidden[-1])
            finished = chosen == self.eos_token_id
            if self.stop:
                finished = finished | self.stop(ids[rows, : t + 1])
            if finished.any():
                lengths[rows[finished]] = t + 1
                ended[rows[finished]] = True
                keep = without(finished)
                if not len(keep):
                    break
                rows, chosen = rows[keep], chosen[keep]
                attention_mask = None if attention_mask is None else attention_mask[keep]
                for cache in caches:
                    keep_rows(cache, keep)
            step_ids = chosen[:, None]
            if attention_mask is not None:
                attention_mask = torch.cat(
                    [attention_mask, attention_mask.new_ones(len(rows), 1)], dim=1
                )
        return ids.cpu(), logprobs.cpu(), units.cpu(), lengths.cpu(), ended.cpu()

    @torch.no_grad()
    def _take_part(self) -> None:
        """A pass that says nothing."""
        ids, attention_mask = pad_left([[0]], self.models[0].device)
        self._hidden(ids, attention_mask, [None] * len(self.models))

    def _hidden(
        self,
        ids: Tensor,
        attention_mask: Tensor | None,
        caches: Sequence[DynamicCache | None],
    ) -> list[Tensor]:
        """For each model the (b, H) hidden states after the last of these tokens."""
        places = None
        if attention_mask is not None:  # positions that padding does not advance
            places = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        hidden = []
        for role, cache in zip(self.models, caches, strict=True):
            with role.active() as model:
                states = trunk_states(
                    model,
                    input_ids=ids,
                    attention_mask=attention_mask,
                    position_ids=places,
                    past_key_values=cache,
                    use_cache=cache is not None,
                )
            hidden.append(states[:, -1])
        return hidden

    def _distribution(self, hidden: list[Tensor], temperature: float) -> Tensor:
        """(b, V) float32 log-probabilities of the next token."""
        logits = [
            output_logits(role.model, h).float()
            for role, h in zip(self.models, hidden, strict=True)
        ]
        combined = logits[0]
        if len(logits) == 2:
            combined = extrapolate(logits[0], logits[1], self.lam, self.bounds)
        if temperature not in (0, 1):
            combined = combined / temperature
        return torch.log_softmax(combined, dim=-1)


def pad_left(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Ids (b, P) that end at one column, and their mask; no mask where nothing is padded."""
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    if all(len(p) == width for p in prompts):
        return ids, None
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


def _invert(log_distribution: Tensor, uniforms: Tensor, greedy: bool) -> Tensor:
    """(b,) the token whose share of the cumulative distribution holds the uniform number."""
    if greedy:
        return log_distribution.argmax(-1)
    cumulative = log_distribution.double().exp().cumsum(-1)
    # Scaled by the total, so that rounding cannot push the number past the last token.
    targets = uniforms.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True).squeeze(1)
