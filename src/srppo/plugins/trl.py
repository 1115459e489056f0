"""The coherent reward for TRL's RLOOTrainer and GRPOTrainer; read against TRL 1.16.

    reward = CoherentReward.load(base, sft)
    RLOOTrainer(model=sft, reward_funcs=reward, callbacks=[reward], args=RLOOConfig(beta=0.5), ...)

As a callback it looks at the trainer's settings before anything is trained. As a reward function it
gets the ids of the completions, but not those of the prompts: these it makes again, as TRL does,
and in the first batch compares them with what the policy read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from srppo.errors import ConfigError
from srppo.plugins.checks import (
    require_kl,
    require_no_clip,
    require_unscaled,
    require_whole_distribution,
)
from srppo.serve.scorer import CoherentScorer

Ids = list[int]
log = logging.getLogger(__name__)


class Scorer(Protocol):
    """`CoherentScorer` in this process, or `RewardClient` of a server."""

    def score(self, prompts: list[Ids], responses: list[Ids]) -> list[list[float]]:
        """Log-ratios of the response tokens, nats."""
        ...


class CoherentReward(TrainerCallback):
    """log pi_sft - log pi_base of each completion, nats; give it as reward and as callback."""

    __name__ = "coherent"

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self._settings: Any = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._ends: set[int] = set()
        self._witness: _Witness | None = None

    @classmethod
    def load(cls, base: str, sft: str, **settings: Any) -> CoherentReward:
        """From model directories or hub names; settings and errors of `CoherentScorer.load`."""
        return cls(CoherentScorer.load(base, sft, **settings))

    def on_init_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """The trainer is made: ConfigError where it would train for something else."""
        check_settings(args)
        tokenizer = kwargs["processing_class"]
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ConfigError(
                "the trainer has a processor of images, and images cannot be scored: the reward "
                "would be that of the text alone. Use a text model and its tokenizer."
            )
        named = model.generation_config.eos_token_id
        named = named if isinstance(named, list) else [] if named is None else [named]
        self._settings, self._tokenizer = args, tokenizer
        self._ends = {tokenizer.eos_token_id, *named}
        self._witness = _Witness(model)

    def __call__(self, prompts: list[Any], completion_ids: list[Ids], **_: object) -> list[float]:
        """One reward a completion.

        Raises:
            ConfigError: it is no callback of the trainer; prompts or ends are not as sampled.
            DataError, ModelError, ServeError: as the scorer does.
        """
        if self._tokenizer is None:
            raise ConfigError(
                "the coherent reward does not know its trainer: nothing could be checked, and the "
                "prompts not be tokenized. Give it as callbacks=[reward] too."
            )
        prompt_ids = self._tokenized(prompts)
        if self._witness:
            self._witness.compare(prompt_ids, completion_ids)
            self._witness = None
        self._require_ends(completion_ids)
        return [sum(ratios) for ratios in self.scorer.score(prompt_ids, completion_ids)]

    def _tokenized(self, prompts: list[Any]) -> list[Ids]:
        """As RLOOTrainer._tokenize_prompts does."""
        assert self._tokenizer is not None
        if isinstance(prompts[0], str):
            return list(self._tokenizer(text=prompts)["input_ids"])
        rendered = self._tokenizer.apply_chat_template(
            conversation=prompts,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **(self._settings.chat_template_kwargs or {}),
        )
        return list(rendered["input_ids"])

    def _require_ends(self, completion_ids: list[Ids]) -> None:
        longest = self._settings.max_completion_length
        for ids in completion_ids:
            if ids[-1] not in self._ends and longest is not None and len(ids) < longest:
                raise ConfigError(
                    f"a completion of {len(ids)} tokens ends with id {ids[-1]}, which is no EOS "
                    f"({sorted(self._ends)}), and was not cut off, either: the reward would lack "
                    "the decision to end. Let nothing but EOS end completions: no stop strings."
                )


def check_settings(args: Any) -> None:
    """ConfigError where an RLOOConfig or GRPOConfig would lead to another optimum than pi*."""
    sampling = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k", "min_p")}
    sampling["repetition_penalty"] = args.repetition_penalty
    require_whole_distribution(sampling | (args.generation_kwargs or {}))
    grpo = hasattr(args, "scale_rewards")
    require_kl("beta", args.beta, default=None if grpo else 0.05)
    require_no_clip(
        "reward_clip_range", getattr(args, "reward_clip_range", None), "Leave it at None."
    )
    if grpo:
        require_unscaled("scale_rewards", args.scale_rewards, "none")
    if args.sync_ref_model:
        raise ConfigError(
            "sync_ref_model=True: the reference would follow the policy, and nothing hold the "
            "policy near pi_sft. Set it to False."
        )


class _Witness:
    """What the policy read until the first reward: rows of ids, padding left out."""

    def __init__(self, model: nn.Module) -> None:
        self.read: set[tuple[int, ...]] = set()
        hook: Callable[..., None] = self._see
        self.handle = model.register_forward_pre_hook(hook, with_kwargs=True)

    def _see(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if ids is not None and mask is not None and ids.shape == mask.shape:  # no step of decoding
            rows = zip(ids, mask.bool(), strict=True)
            self.read |= {tuple(row[real].tolist()) for row, real in rows}

    def compare(self, prompts: list[Ids], completions: list[Ids]) -> None:
        """ConfigError where a prompt is not what the policy read."""
        self.handle.remove()
        if not self.read:
            log.warning(
                "prompts were tokenized again for the reward, and could not be compared with what "
                "the policy read: it was not called in this process."
            )
            return
        for prompt, completion in zip(prompts, completions, strict=True):
            if self.read.isdisjoint({tuple(prompt), tuple(prompt + completion)}):
                raise ConfigError(
                    f"the prompt {prompt[:20]}... as the reward tokenizes it is not what the "
                    "policy read: rewards would belong to other prompts. Tools, documents and "
                    "template settings of single rows are not supported; render such prompts "
                    "beforehand, as text."
                )
