"""What a model is asked: requests as text and as tokens, and what its context does to them.

Imports lm-eval: import this file late.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.utils import normalize_gen_kwargs
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from srppo.data.chat import prompt_text
from srppo.eval.benchmarks import Row

ALPACA_TOKENS = 2048
"""Of a response to AlpacaEval, as alpaca-eval's own models have."""


@dataclass(frozen=True)
class Reader:
    """How text reaches a model: plain, or as a conversation."""

    tokenizer: PreTrainedTokenizerBase
    chat: bool

    def encode(self, text: str) -> list[int]:
        """Token ids. Nothing is added to what a chat template says, as in training; plain text
        gets what the tokenizer adds, unless it begins with BOS already."""
        begun = self.chat or text.startswith(self.tokenizer.bos_token or "\0")
        encoded = self.tokenizer(text, add_special_tokens=not begun, verbose=False)
        return list(encoded["input_ids"])

    def conversation(self, messages: list[dict[str, str]], **options: Any) -> str:
        """The text of a conversation, up to where the answer starts."""
        return prompt_text(self.tokenizer, messages)


def alpaca_requests(
    outputs: Sequence[Row], reader: Reader, max_tokens: int | None
) -> list[Instance]:
    """AlpacaEval's instructions; in plain text they stand alone."""
    settings = {"until": [], "max_gen_toks": max_tokens or ALPACA_TOKENS, "do_sample": False}
    requests = []
    for i, row in enumerate(outputs):
        text = row["instruction"]
        if reader.chat:
            text = reader.conversation([{"role": "user", "content": text}])
        where = ("alpaca_eval", i, 1)
        requests.append(Instance("generate_until", row, (text, settings), 0, metadata=where))
    return requests


def room(wanted: int, longest: int, context: int | None) -> int:
    """Tokens that a response may have, at most: as many as wanted, unless the longest prompt leaves
    fewer; at least half of the context, for which prompts lose their beginning."""
    return wanted if context is None else min(wanted, max(context - longest, context // 2))


def shortened(requests: Sequence[Instance], reader: Reader, context: int | None) -> str:
    """What the context takes from prompts and responses, in words; or ""."""
    if context is None:
        return ""
    notes = []
    if requests[0].request_type == "loglikelihood":
        lengths = [len(reader.encode("".join(request.args))) for request in requests]
        kept = context + 1
    else:
        lengths = [len(reader.encode(request.args[0])) for request in requests]
        wanted = normalize_gen_kwargs(requests[0].args[1])["max_gen_toks"]
        most = room(wanted, max(lengths), context)
        kept = context - most
        if most < wanted:
            notes.append(f"responses have at most {most} tokens instead of {wanted}")
    if cut := sum(n > kept for n in lengths):
        notes.append(f"{cut} of {len(requests)} prompts lose their beginning")
    if not notes:
        return ""
    longest = max(lengths)
    return f"{' and '.join(notes)}: {context} positions, the longest prompt has {longest} tokens"
