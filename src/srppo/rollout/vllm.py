"""Sampling by a vLLM server: ids go there, ids and their log-probabilities come back."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from srppo import distributed
from srppo.config_rollout import RolloutConfig
from srppo.errors import EngineError
from srppo.models.lora import AdapterRole
from srppo.models.roles import Role
from srppo.rollout.sampler import Response, Rollout, Sampler, assemble
from srppo.rollout.transfer import ADAPTER, NCCL, AdapterOnDisk, Disk, Transfer
from srppo.rollout.vllm_server import VLLMServer

WHOLE = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Sampling from the whole distribution. What a request leaves out vLLM takes from the model's
generation_config.json."""
FLOOR = -9999.0
"""What vLLM writes for a log-probability of minus infinity."""


class VLLMSampler(Sampler):
    """Samples from the policy as it was at the last `update_weights`.

    Each response is a request of its own with a seed of its own: one request with several prompts
    would give equal prompts equal responses. Every process asks for its share.
    """

    def __init__(
        self,
        policy: Role,
        settings: RolloutConfig,
        directory: Path,
        *,
        eos_token_id: int,
        max_new_tokens: int,
        longest: int,
    ) -> None:
        """Looks at the server.

        Args:
            directory: where weights are handed over, if they go that way; what it holds is lost.
            longest: tokens of a prompt with its response.

        Raises:
            EngineError: the server is not there, or could not be trained with.
        """
        self.policy = policy
        self.settings = settings
        self.eos_token_id = eos_token_id
        self.max_new_tokens = max_new_tokens
        self.server = VLLMServer(settings)
        self.model = self.server.check(longest)
        self.label = "none yet"
        self.directory = directory
        self._transfer = self._way()

    def _way(self) -> Transfer:
        if isinstance(self.policy, AdapterRole):
            self.model = ADAPTER
            return AdapterOnDisk(self.directory)
        dtype: torch.dtype = getattr(torch, self.settings.weight_dtype)
        if self.settings.weight_transfer == "nccl":
            return NCCL(dtype)
        return Disk(self.directory, dtype)

    def sample(self, prompts: list[list[int]], seed: int) -> Rollout:
        """As asked of any sampler.

        Raises:
            EngineError: the server cannot be reached, fails, has been restarted, or gives what
                cannot be trained on. No response of such a step is used.
        """
        generator = torch.Generator().manual_seed(seed)
        seeds = torch.randint(2**63 - 1, (len(prompts),), generator=generator).tolist()
        mine = distributed.shares([len(p) for p in prompts])[distributed.rank()]
        requests = [self._request(prompts[i], seeds[i]) for i in mine]
        found = self.server.complete(requests, lambda k, x: self._read(prompts[mine[k]], x))
        if (label := self.server.version()) != self.label:
            raise EngineError(
                f"the vLLM server at {self.server.url} samples with weights {label!r}, and the "
                f"policy's are {self.label!r}: it was restarted, or another run uses it, and its "
                "responses are somebody else's. Keep it for this run alone; the same command goes "
                "on."
            )
        responses = dict(zip(mine, found, strict=True))
        return assemble(prompts, responses, self.eos_token_id, self.max_new_tokens)

    def update_weights(self) -> None:
        """Hand the policy over, with requests in flight aborted (those of a run that was killed
        may be) and without what the server remembers of prompts under the weights before."""
        weights = self.policy.whole_weights()
        self.label = distributed.from_first(lambda: self._update(weights))

    def _update(self, weights: dict[str, torch.Tensor] | None) -> str:
        label = f"srppo-{uuid4().hex}"
        self.server.post("/pause", mode="abort")
        self._transfer.send(self.server, self.policy, weights)
        self.server.post("/update_weight_version", {"new_version": label})
        if not self.server.post("/reset_prefix_cache").get("success", True):
            raise EngineError(
                f"the vLLM server at {self.server.url} cannot forget what it computed with the "
                "weights before: responses would begin with those. Start it with "
                "--no-enable-prefix-caching."
            )
        self.server.post("/resume")
        return label

    def wake(self) -> None:
        """With `rollout.sleep`; the server then has its memory again."""
        if self.settings.sleep:
            distributed.from_first(lambda: self.server.post("/wake_up"))

    def sleep(self) -> None:
        """With `rollout.sleep`: its weights wait in CPU memory."""
        if self.settings.sleep:
            distributed.from_first(lambda: self.server.post("/sleep", level=1))

    def close(self) -> None:
        """What was handed over is removed."""
        if distributed.is_first():
            shutil.rmtree(self.directory, ignore_errors=True)

    def _request(self, prompt: list[int], seed: int) -> dict[str, Any]:
        return {
            **WHOLE,
            "model": self.model,
            "prompt": prompt,
            "add_special_tokens": False,
            "max_tokens": self.max_new_tokens,
            "seed": seed,
            "ignore_eos": True,  # the model may name other ends than the one that is trained
            "stop_token_ids": [self.eos_token_id],
            "skip_special_tokens": False,
            "logprobs": 0,  # the sampled token's alone
            "return_token_ids": True,
        }

    def _read(self, prompt: list[int], answer: dict[str, Any]) -> Response:
        try:
            (choice,) = answer["choices"]
            read, ids = choice["prompt_token_ids"], choice["token_ids"]
            logprobs, why = choice["logprobs"]["token_logprobs"], choice["finish_reason"]
        except (KeyError, TypeError, ValueError) as e:
            raise self._useless(f"lacks what vLLM's API promises ({e!r})") from e
        if read != prompt:
            raise self._useless(f"is to a prompt of {_count(read)} ids, not the {len(prompt)} sent")
        if problem := self._problem(ids, logprobs, why):
            raise self._useless(problem)
        return Response(ids, logprobs)

    def _problem(self, ids: Any, logprobs: Any, why: Any) -> str | None:
        """Why a response cannot be trained on."""
        vocabulary = self.policy.config.get_text_config().vocab_size
        if not isinstance(ids, list) or not 0 < len(ids) <= self.max_new_tokens:
            return f"has {_count(ids)} tokens, not 1 to {self.max_new_tokens}"
        if odd := [x for x in ids if type(x) is not int or not 0 <= x < vocabulary]:
            return f"holds the id {odd[0]!r}, and the policy's vocabulary has {vocabulary}"
        if not isinstance(logprobs, list) or len(logprobs) != len(ids):
            return f"has {len(ids)} tokens and {_count(logprobs)} log-probabilities"
        for x in logprobs:
            if not isinstance(x, float | int) or not FLOOR < x <= 1e-3 or math.isnan(x):
                return f"holds the log-probability {x!r}"
        ended = ids[-1] == self.eos_token_id
        if self.eos_token_id in ids[:-1]:
            return f"goes on after its end, id {self.eos_token_id}"
        if not ended and len(ids) < self.max_new_tokens:
            return f"stops after {len(ids)} tokens without an end ({why})"
        return None

    def _useless(self, problem: str) -> EngineError:
        return EngineError(
            f"a response of the vLLM server at {self.server.url} {problem}: the step was not "
            "sampled. Does it serve the policy's base model, by vLLM 0.32 or newer?"
        )


def _count(x: Any) -> str:
    return str(len(x)) if isinstance(x, list) else "no"
