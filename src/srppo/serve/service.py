"""From sequences to scores: what a request goes through once it is understood."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.requests import Request

from srppo.errors import SrppoError
from srppo.serve.batcher import Batcher, Ids
from srppo.serve.guard import RefusedError
from srppo.serve.limits import Limits
from srppo.serve.messages import Chat, Plain, Score
from srppo.serve.scorer import CoherentScorer

log = logging.getLogger(__name__)
Sequence = tuple[Ids, Ids]
"""Prompt and response."""
Text = TypeVar("Text")


class Service:
    """One scorer, its queue, and what a request may ask of them."""

    def __init__(self, scorer: CoherentScorer, limits: Limits) -> None:
        self.scorer = scorer
        self.limits = limits
        self._tokenizing = ThreadPoolExecutor(1, "tokenizing")
        self.batcher = Batcher(scorer.score, limits.batch_tokens, limits.queue_tokens)

    async def tokenized(
        self, encode: Callable[[Text], Sequence], texts: list[Text]
    ) -> list[Sequence]:
        """`encode` of each, one request at a time: a tokenizer's state is shared by all calls."""
        return await asyncio.get_running_loop().run_in_executor(
            self._tokenizing, lambda: [encode(text) for text in texts]
        )

    def encode(self, text: Chat | Plain) -> Sequence:
        """Ids as training makes them, or of the text as it stands."""
        if isinstance(text, Plain):
            return self.scorer.encode_plain(text.prompt, text.response, text.ended)
        messages = [turn.model_dump() for turn in text.messages]
        return self.scorer.encode_chat(messages, text.response, text.ended)

    async def scores(self, request: Request, sequences: list[Sequence]) -> list[Score]:
        """In order; if the client goes or time runs out, their turns are skipped.

        Raises:
            DataError, ModelError: as the scorer does.
            QueueFullError: others are waiting already.
            RefusedError: too many tokens, or not in time.
        """
        for prompt, response in sequences:
            self.scorer.check(prompt, response)
        tokens = sum(len(prompt) + len(response) for prompt, response in sequences)
        if tokens > self.limits.queue_tokens:
            raise RefusedError(
                413,
                f"{tokens} tokens are more than the queue's {self.limits.queue_tokens}: the "
                "request could never be scored. Send fewer sequences at a time.",
            )
        futures = [asyncio.wrap_future(f) for f in self.batcher.submit(sequences)]
        scored = asyncio.gather(*futures)
        gone = asyncio.ensure_future(_gone(request))
        try:
            either: list[asyncio.Future[Any]] = [scored, gone]
            await asyncio.wait(
                either, timeout=self.limits.seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if scored.done():
                return [Score(log_ratios=s, reward=sum(s)) for s in scored.result()]
            left = gone.done()
        except SrppoError:
            raise
        except Exception as e:  # out of memory, for instance; the thread goes on
            log.exception("scoring failed")
            raise RefusedError(
                500, "scoring failed: nothing was scored. The server's output says why."
            ) from e
        finally:
            gone.cancel()
            scored.cancel()
        if left:
            raise RefusedError(499, "the client has gone.")  # for the count alone: nobody reads it
        raise RefusedError(
            504,
            f"not scored within {self.limits.seconds:g} seconds: others came first, or this is too "
            "much at once. Send fewer sequences at a time, or raise the server's --timeout.",
        )


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
