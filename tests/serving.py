"""Scorers of tiny models, and real servers of them on free ports."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

import tiny
from srppo.serve.limits import Limits
from srppo.serve.scorer import CoherentScorer
from srppo.serve.server import listen, make_server

BASE, SFT = tiny.model(seed=0), tiny.model(seed=1)
TOKENIZER = tiny.tokenizer()
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def scorer(**settings: int) -> CoherentScorer:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    return CoherentScorer(BASE, SFT, tokenizer, **settings)


def expected(prompt: list[int], response: list[int]) -> list[float]:
    """By plain forward passes of one row: nothing of srppo."""
    sft, base = (tiny.plain_logprobs(model, prompt, response) for model in (SFT, BASE))
    return (sft - base).tolist()


def pairs(n: int = 9, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    y = tiny.sequences(seed, n)
    return [tiny.row(y, i) for i in range(n)]


def columns(rows: list[tuple[list[int], list[int]]]) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and responses, as scorers take them."""
    return [prompt for prompt, _ in rows], [response for _, response in rows]


def request(sequences: list[tuple[list[int], list[int]]]) -> dict[str, object]:
    return {"sequences": [{"prompt_ids": p, "response_ids": r} for p, r in sequences]}


@contextmanager
def serving(
    scores: CoherentScorer, limits: Limits | None = None, token: str | None = None
) -> Iterator[httpx.Client]:
    """A client of a server in another thread, over real HTTP."""
    with listen("127.0.0.1", 0) as listening:
        server = make_server(scores, "BASE", "SFT", limits or Limits(), token)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        port = listening.getsockname()[1]
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=30, trust_env=False
        ) as client:
            try:
                yield client
            finally:
                server.should_exit = True
                thread.join()
