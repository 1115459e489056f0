"""A model in a conversation: what it has heard and said, and how it samples."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from srppo.data.chat import apply_template, prompt_ids
from srppo.data.schemas import Message
from srppo.errors import ModelError, SrppoError
from srppo.models.load import check_ids, load_model, load_tokenizer
from srppo.models.save import as_trained
from srppo.train.checkpoint import model_in

MAX_TOKENS = 512
"""Of an answer, where neither the user nor the model's generation config says how long."""
TOP_K = 50
"""What transformers takes where a model samples and its generation config says nothing."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Answer:
    """What a model said to one turn."""

    text: str
    tokens: int
    end: Literal["eos", "length", "stopped"]
    """By itself, at the most tokens allowed, or told to."""


@dataclass
class Speaker:
    """One model; each keeps the user's turns and its own answers to them."""

    name: str
    source: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    own_template: bool
    """False: the tokenizer had none, and has our default one."""
    messages: list[Message] = field(default_factory=list)

    @staticmethod
    def load(
        name: str, source: str, dtype: str, device: str, max_tokens: int | None = None
    ) -> Speaker:
        """A run's policy, a model directory, an adapter over its base, or a hub name.

        Raises:
            ModelError, RunDirError: it cannot be loaded.
        """
        path = model_in(source)
        tokenizer = load_tokenizer(path)
        own_template = tokenizer.chat_template is not None
        apply_template(tokenizer)
        model = load_model(path, dtype, device)
        check_ids(tokenizer, model.config, source)
        model.generation_config = _sampling(model.generation_config, tokenizer, max_tokens)
        speaker = Speaker(name, source, model, tokenizer, own_template)
        if speaker.context is not None:
            most = min(speaker.max_tokens, speaker.context)
            model.generation_config.max_new_tokens = most
        return speaker

    def hear(self, text: str) -> list[int]:
        """The user's turn as the model would read it, all before it included: the ids that training
        would make of it. Nothing is remembered yet.

        Raises:
            RowError: the template refuses the conversation, or text needs control tokens.
            ModelError: there is no room for it and a token more.
        """
        ids = prompt_ids(self.tokenizer, [*self.messages, {"role": "user", "content": text}])
        if self.context is not None and len(ids) >= self.context:
            raise ModelError(
                f"the conversation is {len(ids)} tokens long and {self.name} has {self.context} "
                "positions: there is no room for an answer. /reset forgets it."
            )
        return ids

    @torch.no_grad()
    def answer(
        self, text: str, say: Say, seed: int, stop: Callable[[], bool] = lambda: False
    ) -> Answer:
        """Answer the user's turn, piece by piece to `say`; both are remembered.

        The same seed gives equal models equal answers. `stop` is asked after each token.

        Raises: as `hear`; ModelError: probabilities that are not numbers, or too little memory.
        """
        ids = self.hear(text)
        room = self.context - len(ids) if self.context is not None else self.max_tokens
        voice = _Voice(self.tokenizer, say)
        inputs = torch.tensor([ids], device=self.model.device)
        torch.manual_seed(seed)
        try:
            self.model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=min(self.max_tokens, room),
                streamer=voice,
                stopping_criteria=StoppingCriteriaList([_Stop(stop)]),
            )
        except RuntimeError as e:
            if reason := _why_not(e):
                raise ModelError(f"{self.name} cannot answer: {reason}") from e
            raise
        voice.end()
        self.messages += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": voice.text},
        ]
        ended = voice.ids[-1:] and voice.ids[-1] in self.ends
        return Answer(
            voice.text, len(voice.ids), "eos" if ended else "stopped" if stop() else "length"
        )

    def forget(self) -> None:
        """Begin anew; the system message stays."""
        self.messages = [m for m in self.messages if m["role"] == "system"]

    def be_told(self, system: str) -> None:
        """Begin anew with this system message; empty: with none.

        Raises:
            RowError: the template knows no system messages.
        """
        before = self.messages
        self.messages = [{"role": "system", "content": system}] if system else []
        try:
            self.hear("")
        except SrppoError:
            self.messages = before
            raise

    def sample_at(self, temperature: float) -> None:
        """From the whole distribution, as in training, at this temperature; 0 is greedy."""
        plain = as_trained(self.tokenizer, self.max_tokens)
        plain.eos_token_id = self.model.generation_config.eos_token_id
        plain.do_sample = temperature > 0
        plain.temperature = temperature if plain.do_sample else None
        self.model.generation_config = plain

    @property
    def context(self) -> int | None:
        """Positions that the model has; None: not stated."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def max_tokens(self) -> int:
        """Of an answer, at most."""
        return int(self.model.generation_config.max_new_tokens)

    @property
    def ends(self) -> list[int]:
        """Tokens that end an answer."""
        return list(self.model.generation_config.eos_token_id)

    def describe(self) -> str:
        """Size and place of the model; how it samples and where it ends."""
        parameters = sum(p.numel() for p in self.model.parameters())
        dtype = str(self.model.dtype).removeprefix("torch.")
        ends = " or ".join(map(str, self.tokenizer.convert_ids_to_tokens(self.ends)))
        template = "" if self.own_template else "; no chat template of its own, so the default one"
        return (
            f"{self.source}: {_short(parameters)} parameters, {dtype} on {self.model.device}; "
            f"{self.sampling()}, up to {self.max_tokens} tokens or {ends}{template}"
        )

    def sampling(self) -> str:
        """How the next token is chosen, in words."""
        how = self.model.generation_config
        words = [f"temperature {how.temperature:g}" if how.do_sample else "greedy"]
        if how.do_sample and how.top_k:
            words.append(f"top-k {how.top_k}")
        if how.do_sample and how.top_p not in (None, 1.0):
            words.append(f"top-p {how.top_p:g}")
        if how.repetition_penalty not in (None, 1.0):
            words.append(f"repetition penalty {how.repetition_penalty:g}")
        return ", ".join(words)


def _sampling(
    own: GenerationConfig, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None
) -> GenerationConfig:
    """The model's own, with everything said that it leaves to transformers."""
    config = copy.deepcopy(own)
    named = config.eos_token_id
    named = named if isinstance(named, list) else [] if named is None else [named]
    config.eos_token_id = list(dict.fromkeys([tokenizer.eos_token_id, *named]))
    config.pad_token_id = tokenizer.eos_token_id  # one row: never read
    config.max_new_tokens = max_tokens or config.max_new_tokens or MAX_TOKENS
    config.max_length = None
    config.num_beams = 1
    config.do_sample = bool(config.do_sample)
    if config.do_sample:
        config.temperature = 1.0 if config.temperature is None else config.temperature
        config.top_k = TOP_K if config.top_k is None else config.top_k
    return config


class _Stop(StoppingCriteria):
    def __init__(self, stop: Callable[[], bool]) -> None:
        self.stop = stop

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.stop(), device=input_ids.device)


class _Voice(BaseStreamer):
    """Token ids in, text out as soon as it cannot change any more."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, say: Say) -> None:
        self.tokenizer = tokenizer
        self.say = say
        self.ids: list[int] = []
        self.said = 0
        self.prompt_seen = False

    @property
    def text(self) -> str:
        return str(
            self.tokenizer.decode(
                self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def put(self, value: Tensor) -> None:
        """The prompt first, then one token at a time."""
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.ids += value.flatten().tolist()
        text = self.text
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character so far
            self._tell(text)

    def end(self) -> None:
        """Say what was held back."""
        self._tell(self.text)

    def _tell(self, text: str) -> None:
        if len(text) > self.said:
            self.say(text[self.said :])
            self.said = len(text)


def _short(count: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def _why_not(error: RuntimeError) -> str | None:
    """What the user can do something about."""
    first = str(error).splitlines()[0]
    if isinstance(error, torch.OutOfMemoryError):
        return f"no memory is left ({first}). Try /reset, or --dtype bfloat16."
    if "probability tensor" in first:
        return (
            f"it gives probabilities that are not numbers ({first}), its training has diverged. "
            "Train it with a lower learning rate."
        )
    return None
