"""A client of `srppo serve-reward`. The standard library only: it also runs where srppo's own
dependencies are not installed, inside OpenRLHF and verl (`pip install --no-deps srppo`)."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPMessage, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from srppo.errors import ConfigError, ServeError

Ids = list[int]
URL, TOKEN = "SRPPO_REWARD_URL", "SRPPO_REWARD_TOKEN"
"""Environment variables: where the server is, and what it asks for."""


@dataclass(frozen=True)
class RewardClient:
    """Scores by a server; what `srppo.serve.scorer.CoherentScorer` does, elsewhere."""

    url: str
    token: str | None = None
    timeout: float = 180.0
    """Seconds for one attempt."""
    patience: float = 600.0
    """Seconds over which a busy or absent server is asked again."""

    @classmethod
    def from_environment(cls) -> RewardClient:
        """Of the server that SRPPO_REWARD_URL names; ConfigError without it."""
        url = os.environ.get(URL, "")
        if not url.startswith(("http://", "https://")):
            raise ConfigError(
                f"{URL}={url!r} is not the address of a scoring server: nothing can be scored. "
                "Start one with `srppo serve-reward --base B --sft S` and set it in the "
                f"environment of every worker, as {URL}=http://HOST:8000"
            )
        return cls(url.rstrip("/"), os.environ.get(TOKEN) or None)

    def score(self, prompts: list[Ids], responses: list[Ids]) -> list[list[float]]:
        """Nats, log pi_sft - log pi_base of each response token.

        Raises:
            ServeError: the server cannot be reached, or refuses.
        """
        sequences = [
            {"prompt_ids": prompt, "response_ids": response}
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        answer = self._ask("/v1/score", {"sequences": sequences})
        return [score["log_ratios"] for score in answer["scores"]]

    def model(self) -> dict[str, Any]:
        """What the server scores with: base, sft, vocab_size, context, eos_token_id, version."""
        return self._ask("/v1/model")

    def reward_text(self, queries: list[str], prompts: list[str]) -> list[float]:
        """Rewards of text, as OpenRLHF hands it out; ServeError as `score`."""
        answer = self._ask("/openrlhf", {"query": queries, "prompts": prompts})
        rewards: list[float] = answer["rewards"]
        return rewards

    def _ask(self, path: str, content: Mapping[str, Any] | None = None) -> dict[str, Any]:
        until = time.monotonic() + self.patience
        while True:
            wait = 1.0
            try:
                status, headers, told = self._attempt(path, content)
            except (OSError, HTTPException) as e:
                problem = (
                    f"{self.url} does not answer ({e!r}): nothing was scored. Is `srppo "
                    f"serve-reward` running there, and is the address right?"
                )
            else:
                if status == 200:
                    answer: dict[str, Any] = json.loads(told)
                    return answer
                problem = f"{self.url}{path} answered {status}, {told!r}: nothing was scored."
                if status != 503:
                    raise ServeError(problem)
                wait = float(headers.get("Retry-After", wait))
            if time.monotonic() + wait > until:
                raise ServeError(f"{problem} Asked for {self.patience:g} seconds.")
            time.sleep(wait)

    def _attempt(
        self, path: str, content: Mapping[str, Any] | None
    ) -> tuple[int, HTTPMessage, str]:
        """Status, headers and body. Straight to the server: no proxy, no redirection, either of
        which would see the token."""
        at = urlsplit(self.url)
        connect = HTTPSConnection if at.scheme == "https" else HTTPConnection
        headers = {"Content-Type": "application/json"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        with closing(connect(at.netloc, timeout=self.timeout)) as connection:
            if content is None:
                connection.request("GET", at.path + path, headers=headers)
            else:
                connection.request("POST", at.path + path, json.dumps(content), headers)
            response = connection.getresponse()
            return response.status, response.headers, response.read().decode()
