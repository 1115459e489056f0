"""The coherent reward of given responses, token by token: what server and plugins share."""

from __future__ import annotations

from typing import Literal

import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from srppo.algo.reward import token_log_ratios
from srppo.config import LoRAConfig, ModelConfig
from srppo.data.chat import apply_template, encode
from srppo.data.schemas import Message
from srppo.errors import DataError, ModelError
from srppo.models.batching import Sequences
from srppo.models.load import check_same_tokens, has_tokenizer, is_adapter, load_tokenizer
from srppo.models.roles import Role
from srppo.models.scoring import score
from srppo.models.start import start_frozen

Ids = list[int]


class CoherentScorer:
    """log pi_sft - log pi_base of each response token, at temperature 1; arXiv:2510.21090.

    Not for several threads at once: roles may share their weights and take turns with them.
    """

    def __init__(
        self,
        base: Role | PreTrainedModel,
        sft: Role | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens_per_batch: int = 16384,
    ) -> None:
        """`max_tokens_per_batch`, padding included, goes through a model at a time: memory."""
        self.base, self.sft = Role.of(base).freeze(), Role.of(sft).freeze()
        self.tokenizer = tokenizer
        self.max_tokens_per_batch = max_tokens_per_batch
        configs = [role.config.get_text_config() for role in (self.base, self.sft)]
        self.vocab_size = min(config.vocab_size for config in configs)
        stated = [getattr(config, "max_position_embeddings", None) for config in configs]
        self.context: int | None = min((n for n in stated if n is not None), default=None)
        """Longest prompt with response, in tokens; None: not stated."""

    @classmethod
    def load(
        cls,
        base: str,
        sft: str,
        *,
        dtype: Literal["float32", "bfloat16"] = "float32",
        device: str = "auto",
        max_tokens_per_batch: int = 16384,
    ) -> CoherentScorer:
        """From model directories or hub names; an adapter as `sft` shares the weights of `base`.

        Raises:
            ModelError: a model cannot be loaded, or the two do not share their tokens.
        """
        tokenizer = load_tokenizer(base)
        if has_tokenizer(sft):
            ours, tokenizer = tokenizer, load_tokenizer(sft)
            check_same_tokens(ours, tokenizer, base, sft)
        apply_template(tokenizer)
        lora = LoRAConfig() if is_adapter(sft) else None
        config = ModelConfig(base=base, dtype=dtype, device=device, lora=lora)
        roles = start_frozen(config, sft, seed=0)  # nothing starts from nothing: no seed is used
        return cls(*roles, tokenizer, max_tokens_per_batch)

    def score(self, prompts: list[Ids], responses: list[Ids]) -> list[list[float]]:
        """Nats, one number a response token; their sum is the reward of the response.

        Raises:
            DataError: a sequence that the models cannot read.
            ModelError: log-probabilities that are not numbers.
        """
        for prompt, response in zip(prompts, responses, strict=True):
            self.check(prompt, response)
        y = Sequences.of(prompts, responses)
        sft, base = (score(role, y, self.max_tokens_per_batch) for role in (self.sft, self.base))
        ratios = token_log_ratios(sft, base, y.mask)
        if not torch.isfinite(ratios).all():
            raise ModelError(
                "log pi_sft - log pi_base is not a number for some token: there is no reward. A "
                "model has diverged, or dtype is too narrow for it; try --dtype float32."
            )
        return [row[mask].tolist() for row, mask in zip(ratios, y.mask, strict=True)]

    def check(self, prompt: Ids, response: Ids) -> None:
        """Raise DataError unless both models can read these ids."""
        if not prompt or not response:
            empty = "response" if prompt else "prompt"
            raise DataError(
                f"an empty {empty}: there is nothing to score. A prompt needs a token, BOS for "
                "instance; a response that ends at once is the EOS token alone."
            )
        ids = prompt + response
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            odd = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise DataError(
                f"token id {odd} is not in the vocabulary of {self.vocab_size}: the models give it "
                "no probability. Use the tokenizer of the SFT model, and leave padding out."
            )
        if self.context is not None and len(ids) > self.context:
            raise DataError(
                f"{len(ids)} tokens (prompt {len(prompt)}, response {len(response)}) do not fit "
                f"into the {self.context} positions of the models. Shorten prompts or responses."
            )

    def encode_chat(self, messages: list[Message], response: str, ended: bool) -> tuple[Ids, Ids]:
        """Ids as training makes them of a conversation; EOS closes the response if it `ended`.

        Raises:
            RowError: the template refuses the conversation, or text needs control tokens.
        """
        example = encode(self.tokenizer, messages, response)
        return example.prompt_ids, example.response_ids[: None if ended else -1]

    def encode_plain(self, prompt: str, response: str, ended: bool) -> tuple[Ids, Ids]:
        """Ids of text as a model reads it: no template, nothing added but EOS if it `ended`;
        control tokens that are spelt out count as such."""
        prompt_ids, response_ids = self.split(prompt + response, prompt)
        eos = [self.tokenizer.eos_token_id] if ended else []
        return prompt_ids, response_ids + eos

    def split(self, text: str, prompt: str) -> tuple[Ids, Ids]:
        """Ids of the prompt that a text begins with, and of what follows it.

        Raises:
            DataError: the text does not begin with the prompt.
        """
        prompt_ids, both = self._ids(prompt), self._ids(text)
        if both[: len(prompt_ids)] == prompt_ids:
            return prompt_ids, both[len(prompt_ids) :]
        if not text.startswith(prompt):
            raise DataError(
                f"the text {text[:40]!r}... does not begin with its prompt {prompt[:40]!r}...: "
                "which tokens are the response's is not known. The prompt was cut, or the "
                "tokenizer does not give text back unchanged; send token ids instead."
            )
        return prompt_ids, self._ids(text[len(prompt) :])

    def _ids(self, text: str) -> Ids:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
