"""A judge in this process: a Hugging Face model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srppo.data.chat import Example, apply_template, encode
from srppo.data.schemas import Message, RowError
from srppo.errors import JudgeError, ModelError
from srppo.eval.judge import Form, Note, Verdict
from srppo.eval.references import REFERENCE_JUDGE
from srppo.models.batching import Sequences
from srppo.models.load import context_length, load_model, load_tokenizer, pick_device
from srppo.models.scoring import score

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

CHUNK = 32
"""Pairs between two writes."""


@dataclass(frozen=True)
class LocalJudge:
    """A causal language model in this process, by the probabilities of "m" and "M"."""

    model: str
    """Directory or hub name."""
    device: str = "auto"
    dtype: str | None = None
    """None: bfloat16 on a GPU, else float32."""
    max_tokens_per_batch: int = 16384

    @property
    def record(self) -> dict[str, Any]:
        """The model's name; of a directory its last part."""
        return {"local": Path(self.model).name if Path(self.model).exists() else self.model}

    def label(self, form: Form) -> str:
        """The same name."""
        return str(self.record["local"])

    def problems(self) -> list[str]:
        """Loads the tokenizer, not the model."""
        try:
            self._answers(self._tokenizer())
        except (ModelError, JudgeError, RowError) as e:
            return [str(e)]
        return []

    def form(self) -> Form:
        """By log-probabilities."""
        return Form.of(REFERENCE_JUDGE)

    def ask(self, form: Form, questions: Sequence[list[Message]], note: Note) -> Counter[str]:
        """In chunks that are always the same, so that going on later changes no verdict."""
        tokenizer, context = self._tokenizer(), context_length(self.model)
        self._answers(tokenizer)
        place = pick_device(self.device)
        dtype = self.dtype or ("bfloat16" if place.type == "cuda" else "float32")
        model = load_model(self.model, dtype, str(place))
        for start in range(0, len(questions), CHUNK):
            pairs: dict[int, list[Example]] = {}
            for i, question in enumerate(questions[start : start + CHUNK], start):
                try:
                    pair = [_encode(tokenizer, question, answer) for answer in ("m", "M")]
                except RowError as e:
                    note(i, Verdict(None, 1, None, str(e)))
                    continue
                size = max(len(e.prompt_ids) + len(e.response_ids) - 1 for e in pair)
                if context and size > context:
                    reason = f"{size} tokens do not fit the judge's context of {context}"
                    note(i, Verdict(None, 1, None, reason))
                else:
                    pairs[i] = pair
            examples = [example for pair in pairs.values() for example in pair]
            if not examples:
                continue
            y = Sequences.of(
                [e.prompt_ids for e in examples], [e.response_ids[:-1] for e in examples]
            )
            logprobs = score(model, y, self.max_tokens_per_batch).sum(1).view(-1, 2).tolist()
            for i, (m, M) in zip(pairs, logprobs, strict=True):
                answer = _answer(m, M)
                if math.isfinite(m) and math.isfinite(M):
                    note(i, Verdict(form.read(answer), 1, answer))
                else:
                    note(i, Verdict(None, 1, None, f"log-probabilities {m} and {M}"))
        return Counter()

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = load_tokenizer(self.model)
        apply_template(tokenizer)
        return tokenizer

    def _answers(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises JudgeError where the two answers are one and the same to the model."""
        user: list[Message] = [{"role": "user", "content": "m or M?"}]
        if len({tuple(_encode(tokenizer, user, answer).response_ids) for answer in "mM"}) < 2:
            raise JudgeError(
                f"the tokenizer of {self.model!r} reads m and M as the same token: every verdict "
                "would be a draw. Take another judge."
            )


def _encode(tokenizer: PreTrainedTokenizerBase, question: list[Message], answer: str) -> Example:
    """Where a chat template knows no system turn, its text begins the user's turn."""
    try:
        return encode(tokenizer, question, answer)
    except RowError:
        if question[0]["role"] != "system":
            raise
        joined = "\n\n".join(message["content"] for message in question)
        return encode(tokenizer, [{"role": "user", "content": joined}], answer)


def _answer(m: float, M: float) -> dict[str, Any]:
    """As the chat API would send it."""
    top = [{"token": "m", "logprob": m}, {"token": "M", "logprob": M}]
    return {
        "message": {"role": "assistant", "content": "m" if m > M else "M"},
        "logprobs": {"content": [{"top_logprobs": top}]},
    }
