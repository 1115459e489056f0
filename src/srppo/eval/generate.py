"""A model as lm-eval sees one: greedy responses by our own sampler, likelihoods by our own scoring.

Imports lm-eval: import this file late.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from srppo import distributed
from srppo.algo.logprobs import token_logprobs
from srppo.eval.ask import Reader, room
from srppo.eval.benchmarks import Row, sha256
from srppo.eval.evaluate import decode
from srppo.eval.responses import Finished
from srppo.models.batching import Sequences, microbatches
from srppo.models.roles import Role
from srppo.models.scoring import chunks, hidden_states, output_logits
from srppo.rollout.hf import HFSampler, Progress

CHUNK = 32
"""Requests that are finished, and stored, together."""


class Engine(TemplateLM):
    """Answers requests in fixed chunks, longest prompts first; a model is loaded when it is asked
    something that is not `Finished`."""

    def __init__(
        self,
        load: Callable[[], Role],
        reader: Reader,
        *,
        context: int | None,
        max_tokens_per_batch: int,
        path: Path | None = None,
        origin: Row | None = None,
        progress: Progress = lambda n: None,
    ) -> None:
        """Args:
        context: positions of the model; None: not stated.
        path: where answers are kept; None: nowhere.
        origin: what they depend on beside the requests.
        progress: counts requests.
        """
        super().__init__()
        self._load = load
        self.reader = reader
        self.tokenizer = reader.tokenizer
        self.context = context
        self.budget = max_tokens_per_batch
        self.path = path
        self.origin = origin or {}
        self.progress = progress
        self.settings: Row = {}
        """How the last call's responses were made."""
        self.answers: list[Row] = []
        """The last call's, in the order of its requests: prompt's hash, whether the prompt was cut;
        text, length in tokens and whether it ended; or log-probability in nats and whether every
        token was the likeliest."""

    @cached_property
    def model(self) -> Role:
        """Loaded now."""
        return self._load()

    @property
    def eot_token_id(self) -> int:
        """EOS."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: BOS, else EOS."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """For caches of lm-eval, which are not used."""
        return str(self.tokenizer.name_or_path)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """As the reader does, unless `add_special_tokens` says."""
        if add_special_tokens is None:
            return self.reader.encode(string)
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"])

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """As the reader does."""
        return self.reader.conversation(chat_history)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Greedy responses, each up to the first stop string."""
        texts = [request.args[0] for request in requests]
        settings = normalize_gen_kwargs(requests[0].args[1])
        eos = self.tokenizer.decode([self.eot_token_id])
        until = handle_stop_sequences(list(settings["until"]), eos)
        prompts = [self.reader.encode(text) for text in texts]
        most = room(settings["max_gen_toks"], max(map(len, prompts)), self.context)
        kept = None if self.context is None else self.context - most
        self.settings = {
            "decoding": "greedy",
            "until": settings["until"],
            "max_tokens": most,
            "max_tokens_wanted": settings["max_gen_toks"],
        }

        def answer(chunk: list[int]) -> list[Row]:
            sampler = HFSampler(
                self.model,
                eos_token_id=self.eot_token_id,
                max_new_tokens=most,
                max_tokens_per_batch=self.budget,
                stop=_Stop(self.tokenizer, until, _ends(self.model)),
            )
            rollout = sampler.sample([prompts[i][-(kept or 0) :] for i in chunk], 0, temperature=0)
            y = rollout.sequences
            columns = zip(
                chunk, decode(self.tokenizer, y), y.lengths.tolist(), rollout.ended.tolist(),
                strict=True,
            )  # fmt: skip
            return [
                {
                    "text": postprocess_generated_text(text, until, None),
                    "length": length,
                    "ended": ended,
                    "truncated_prompt": kept is not None and len(prompts[i]) > kept,
                }
                for i, text, length, ended in columns
            ]

        self._answer(texts, [len(p) for p in prompts], answer)
        return [row["text"] for row in self.answers]

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """log p(continuation | context) in nats, and whether greedy decoding would say it."""
        return list(super().loglikelihood(requests, disable_tqdm=disable_tqdm))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        # The last token is predicted and never read: there is room for one more.
        most = None if self.context is None else self.context + 1
        wholes = [context + continuation for _, context, continuation in requests]
        kept = [whole[-(most or 0) :] for whole in wholes]
        ends = [continuation for _, _, continuation in requests]

        def answer(chunk: list[int]) -> list[Row]:
            prompts = [kept[i][: -len(ends[i])] for i in chunk]
            pairs = _score(self.model, Sequences.of(prompts, [ends[i] for i in chunk]), self.budget)
            return [
                {"logprob": p, "greedy": greedy, "truncated_prompt": len(wholes[i]) > len(kept[i])}
                for i, (p, greedy) in zip(chunk, pairs, strict=True)
            ]

        texts = ["\0".join(pair) for pair, _, _ in requests]
        self.settings = {}
        self._answer(texts, [len(w) for w in wholes], answer)
        return [(row["logprob"], row["greedy"]) for row in self.answers]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """No benchmark here asks for it."""
        raise NotImplementedError("log-likelihoods of whole texts")

    def _answer(
        self,
        texts: list[str],
        lengths: list[int],
        answer: Callable[[list[int]], list[Row]],
    ) -> None:
        hashes = [sha256(text) for text in texts]
        order = sorted(range(len(texts)), key=lambda i: (-lengths[i], i))
        parts = [order[i : i + CHUNK] for i in range(0, len(order), CHUNK)]
        origin = {**self.origin, **self.settings, "requests_sha256": sha256("".join(hashes))}
        # Of several processes the first one keeps them.
        finished = Finished(self.path if distributed.is_first() else None, origin, parts)
        finished.rows = distributed.from_first(lambda: finished.rows)
        self.progress(len(finished.rows))
        for part in parts:
            if part[0] in finished.rows:
                continue
            rows = zip(part, answer(part), strict=True)
            finished.add([{"request": i, "request_sha256": hashes[i], **row} for i, row in rows])
            self.progress(len(part))
        self.answers = [finished.rows[i] for i in range(len(texts))]


def _ends(role: Role) -> list[int]:
    """Tokens beside the tokenizer's EOS at which the model's generation config ends."""
    named = role.model.generation_config.eos_token_id
    return named if isinstance(named, list) else [] if named is None else [named]


class _Stop:
    """Which rows have just written a stop string or another end token."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, strings: list[str], ends: list[int]
    ) -> None:
        self.tokenizer = tokenizer
        self.strings = strings
        self.ends = ends
        # A token is at least a byte; one more at each side, for spaces that decoding drops.
        self.window = max(len(s.encode()) for s in strings) + 2

    def __call__(self, ids: Tensor) -> Tensor:
        """(b, t) response ids -> (b,) bool."""
        texts = self.tokenizer.batch_decode(ids[:, -self.window :])
        stopped = [any(s in text for s in self.strings) for text in texts]
        ended = torch.isin(ids[:, -1], ids.new_tensor(self.ends))
        return ended | torch.tensor(stopped, device=ids.device)


@torch.no_grad()
def _score(role: Role, sequences: Sequences, max_tokens: int) -> list[tuple[float, bool]]:
    """Of each response: sum of log-probabilities in nats, and whether all were the likeliest."""
    logprobs, missed = torch.zeros(2, *sequences.mask.shape)
    rows = torch.arange(len(sequences))
    with role.active() as model:
        for batch in microbatches(sequences, rows, max_tokens, role.device):
            hidden = hidden_states(model, batch)
            parts = []
            for some in chunks(model, batch):
                logits, ids = output_logits(model, hidden[some]), batch.response_ids[some]
                parts.append((token_logprobs(logits, ids), logits.argmax(-1) != ids))
            batch.put(logprobs, torch.cat([p for p, _ in parts]))
            batch.put(missed, torch.cat([m for _, m in parts]))
    distributed.add([logprobs, missed])
    return list(zip(logprobs.sum(1).tolist(), (missed.sum(1) == 0).tolist(), strict=True))
