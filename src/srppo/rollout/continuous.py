"""Sampling by transformers' continuous batching: a response that ends makes room for the next."""

from __future__ import annotations

import copy
import math

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from srppo import distributed
from srppo.errors import EngineError
from srppo.models.lora import AdapterRole
from srppo.models.precision import Compute
from srppo.models.roles import Role
from srppo.rollout.sampler import Response, Rollout, Sampler, assemble

SMALL = {"page_size": 16, "num_blocks": 256, "max_batch_tokens": 512}
"""Of the cache on a CPU, where it would otherwise take most of the memory, and a mask of that size
by the tokens of a batch more. It is there to be tried; `transformers` is faster on a CPU."""


class ContinuousSampler(Sampler):
    """`generate_batch` of transformers 5.23. Its cache is there while it samples.

    It computes in the format of the weights (autocast does not reach its thread): with `compute`
    bfloat16 on the policy's own weights it keeps a copy of them in bfloat16.
    """

    def __init__(
        self,
        policy: Role,
        *,
        eos_token_id: int,
        max_new_tokens: int,
        compute: Compute = "float32",
    ) -> None:
        self.policy = policy
        self.eos_token_id = eos_token_id
        self.max_new_tokens = max_new_tokens
        self.copy: PreTrainedModel | None = None
        if compute == "bfloat16" and not isinstance(policy, AdapterRole):
            with policy.active() as model:
                self.copy = copy.deepcopy(model).to(torch.bfloat16).requires_grad_(False)

    @torch.no_grad()
    def update_weights(self) -> None:
        """The copy's, where there is one."""
        if self.copy is not None:
            with self.policy.active() as model:
                for mine, theirs in zip(self.copy.parameters(), model.parameters(), strict=True):
                    mine.copy_(theirs)

    def sample(self, prompts: list[list[int]], seed: int) -> Rollout:
        """As asked of any sampler; each process samples its share, on its own GPU.

        Raises:
            EngineError: a response failed, or its numbers are none.
        """
        shares = distributed.shares([len(p) for p in prompts])
        mine = shares[distributed.rank()]
        generation = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=self.eos_token_id,
            pad_token_id=self.eos_token_id,
        )
        with self.policy.active() as model, torch.random.fork_rng():  # it seeds torch's own
            model = self.copy or model
            results = model.generate_batch(
                [prompts[i] for i in mine],
                generation_config=generation,
                continuous_batching_config=ContinuousBatchingConfig(
                    return_logprobs=True,
                    seed=_seeds(seed)[distributed.rank()],
                    # Flash attention's kernels know no float32.
                    auto_switch_to_flash=model.dtype != torch.float32,
                    **(SMALL if model.device.type == "cpu" else {}),
                ),
            )
        found = list(results.values())
        if len(found) < len(mine):
            raise _useless(f"{len(mine) - len(found)} of {len(mine)} responses are missing")
        responses = {}
        for i, result in zip(mine, found, strict=True):
            ids, logprobs = result.generated_tokens, result.logprobs
            if result.error or not ids or len(logprobs) != len(ids):
                raise _useless(f"a response failed ({result.error})")
            if not all(map(math.isfinite, logprobs)):
                raise _useless("log-probabilities are no numbers")
            responses[i] = Response(ids, logprobs)
        return assemble(prompts, responses, self.eos_token_id, self.max_new_tokens)


def _seeds(seed: int) -> list[int]:
    """One for each process: those of one step are nothing like those of another."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**63 - 1, (distributed.size(),), generator=generator).tolist()


def _useless(problem: str) -> EngineError:
    return EngineError(
        f"transformers' continuous batching: {problem}. The step was not sampled. Go on with "
        "rollout.engine=transformers and --allow-change."
    )
