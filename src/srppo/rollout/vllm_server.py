"""A vLLM server by its documented HTTP API, and nothing else of vLLM.

Written against vLLM 0.32.0: `/v1/completions` (vllm/entrypoints/openai/completion/protocol.py), and
what VLLM_SERVER_DEV_MODE=1 adds: pause, resume and weights (entrypoints/rl/online/api_router.py),
`/collective_rpc`, `/sleep`, `/reset_prefix_cache` (entrypoints/serve/dev/). docs/rollout.md.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx2

from srppo import aio
from srppo.config_rollout import RolloutConfig
from srppo.errors import EngineError
from srppo.rollout.sampler import Response

KEY = "VLLM_API_KEY"
"""Environment variable with the server's API key: vLLM's own name for it."""
OLDEST = (0, 32)
"""The version whose API this is."""
PAUSE = 1.0
"""Seconds between two attempts."""
IN_WORDS = ("/v1/load_lora_adapter",)
"""Calls whose success is told in words, not in JSON."""
IDLE = 2.0
"""Seconds that an unused connection is kept: vLLM closes them after five, and one that it has just
closed would lose the next request."""
SAID = 400
"""Characters of an answer that an error repeats."""
CURES = {
    None: "Start it, or correct rollout.url; the same command then goes on.",
    401: f"Set {KEY} to its key in the environment of this process.",
    404: "Start it with VLLM_SERVER_DEV_MODE=1 in its environment, as docs/rollout.md says.",
}
"""By status; None: no answer."""
UNHEARD = (httpx2.ConnectError, httpx2.ConnectTimeout)
"""Nothing was sent: to ask again is safe, whatever was asked."""


class VLLMServer:
    """Its calls. One that was not heard, or that the server was too busy for, is made again over
    `patience`; others only where that does no harm."""

    def __init__(self, settings: RolloutConfig) -> None:
        assert settings.url
        self.settings = settings
        self.url = settings.url.rstrip("/")

    def call(self, method: str, path: str, content: Any = None, **query: Any) -> dict[str, Any]:
        """One call that may change the server.

        Raises:
            EngineError: it cannot be reached, is too slow, or refuses.
        """

        async def work() -> dict[str, Any]:
            async with self._client() as client:
                return await self._ask(client, method, path, content, query)

        return aio.run(work())

    def post(self, path: str, content: Any = None, **query: Any) -> dict[str, Any]:
        """`call` with POST."""
        return self.call("POST", path, content, **query)

    def check(self, longest: int) -> str:
        """The name of the model that it serves.

        Args:
            longest: tokens of a prompt with its response.

        Raises:
            EngineError: it could not be trained with.
        """
        version = str(self.call("GET", "/version").get("version"))
        numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
        if numbers < OLDEST:
            raise self._error(
                f"runs vLLM {version}, whose API for training is another: nothing can be sampled",
                f"Install vLLM {'.'.join(map(str, OLDEST))} or newer there.",
            )
        models = self.call("GET", "/v1/models").get("data")
        if not models or "id" not in models[0]:
            raise self._error("serves no model: nothing can be sampled", "Look at its log.")
        room = models[0].get("max_model_len")
        if isinstance(room, int) and room < longest:
            raise self._error(
                f"reads at most {room} tokens, and a prompt with its response may have {longest}: "
                "responses would be cut off early",
                f"Start it with --max-model-len {longest}.",
            )
        return str(models[0]["id"])

    def version(self) -> str | None:
        """The label of the weights that it samples with."""
        label = self.call("GET", "/weight_info").get("weight_version")
        return label if label is None else str(label)

    def complete(
        self,
        requests: Sequence[dict[str, Any]],
        read: Callable[[int, dict[str, Any]], Response],
    ) -> list[Response]:
        """The answers to so many completion requests, in their order, each as `read` reads it.

        Raises:
            EngineError: one of them failed; no other is waited for.
        """

        async def work() -> list[Response]:
            turns = asyncio.Semaphore(self.settings.concurrency)

            async def one(k: int) -> Response:
                async with turns:
                    answer = await self._ask(
                        client, "POST", "/v1/completions", requests[k], {}, True
                    )
                return read(k, answer)

            async with self._client() as client:
                return await asyncio.gather(*map(one, range(len(requests))))

        return aio.run(work())

    def _client(self) -> httpx2.AsyncClient:
        """Straight to the server: a proxy would see the key."""
        key = os.environ.get(KEY)
        n = self.settings.concurrency
        return httpx2.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(self.settings.timeout, connect=10.0),
            limits=httpx2.Limits(
                max_connections=n, max_keepalive_connections=n, keepalive_expiry=IDLE
            ),
            trust_env=False,
        )

    async def _ask(
        self,
        client: httpx2.AsyncClient,
        method: str,
        path: str,
        content: Any,
        query: dict[str, Any],
        repeatable: bool = False,
    ) -> dict[str, Any]:
        until = time.monotonic() + self.settings.patience
        while True:
            try:
                answer = await client.request(method, path, json=content, params=query)
            except httpx2.TransportError as e:
                if isinstance(e, httpx2.TimeoutException) and not isinstance(e, UNHEARD):
                    raise self._error(
                        f"has not answered {path} within {self.settings.timeout:g} seconds: the "
                        "step was not sampled",
                        "Raise rollout.timeout, or lower rollout.concurrency.",
                    ) from e
                status, problem = None, f"does not answer ({type(e).__name__}: {e})"
                again = isinstance(e, UNHEARD) or repeatable
            else:
                status = answer.status_code
                if status == 200:
                    return self._content(path, answer)
                problem = f"answered {path} with {status}, {answer.text[:SAID]!r}"
                again = status in (429, 503) or (repeatable and status >= 500)
            if not again or time.monotonic() + PAUSE > until:
                asked = f", asked for {self.settings.patience:g} seconds" if again else ""
                cure = CURES.get(status, "Its log says more; then the same command goes on.")
                raise self._error(f"{problem}{asked}: the step was not sampled", cure)
            await asyncio.sleep(PAUSE)

    def _content(self, path: str, answer: httpx2.Response) -> dict[str, Any]:
        if path in IN_WORDS:
            return {}
        try:
            content = answer.json() if answer.content else {}
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise self._error(
                f"answered {path} with {answer.text[:SAID]!r}, which is not vLLM's JSON: nothing "
                "can be sampled",
                "Is rollout.url the address of a vLLM server?",
            )
        return content

    def _error(self, problem: str, cure: str) -> EngineError:
        return EngineError(f"the vLLM server at {self.url} {problem}. {cure}")
