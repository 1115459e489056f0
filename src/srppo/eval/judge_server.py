"""A judge behind OpenAI's chat API, wherever it is served."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from srppo import aio
from srppo.data.schemas import Message
from srppo.errors import JudgeError
from srppo.eval.judge import FORMS, STUMBLES, Form, Note, Verdict
from srppo.eval.references import REFERENCE_JUDGE

if TYPE_CHECKING:
    from openai import AsyncOpenAI

REFERENCE_MODEL = "gpt-4-1106-preview"
ASKED = 3
"""Times that a question is put before its answers count as unreadable."""
HOPELESS = 10
"""Questions in a row without a verdict after which no more are put."""


@dataclass(frozen=True)
class ServerJudge:
    """A model behind OpenAI's chat API. Time-outs, dropped connections, 408, 409, 429 and 5xx are
    tried again by OpenAI's client, after the pause that the server asks for, or a growing one."""

    url: str
    """http://HOST:PORT/v1"""
    model: str
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the key; it is read when it is needed and written nowhere."""
    timeout: float = 60.0
    """Seconds for one answer."""
    concurrency: int = 5
    """Questions at a time (alpaca-eval's)."""
    retries: int = 8
    """Tries after the first; the pauses add up to half a minute."""

    @property
    def record(self) -> dict[str, Any]:
        """Host and path, without a user's name or password in the address."""
        parts = urlsplit(self.url)
        place = parts.netloc.rpartition("@")[2] + parts.path
        return {"server": f"{parts.scheme}://{place}", "model": self.model}

    def label(self, form: Form) -> str:
        """The reference judge under alpaca-eval's name for it, any other under the model's."""
        reference = self.model == REFERENCE_MODEL and form.name == REFERENCE_JUDGE
        return REFERENCE_JUDGE if reference else self.model

    def problems(self) -> list[str]:
        """Asks it for one answer."""
        try:
            self.form()
        except JudgeError as e:
            return [str(e)]
        return []

    def form(self) -> Form:
        """The first of FORMS that it answers, found out with a question or a few.

        Raises:
            JudgeError: it answers none.
        """
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise JudgeError(
                f"judge URL {self.url!r} is no http address: nobody can be asked. "
                "Give http://HOST:PORT/v1."
            )
        verdicts: list[Verdict] = []
        for form in map(Form.of, FORMS):
            self.ask(form, [form.question("1+1=", "2", "3")], lambda _, v: verdicts.append(v))
            found = verdicts[-1]
            answer = found.answer or {}
            if found.preference is not None or (form.reads_logprobs and answer.get("logprobs")):
                return form
        if found.answer is None:
            raise self._unusable(str(found.reason))
        return form

    def ask(self, form: Form, questions: Sequence[list[Message]], note: Note) -> Counter[str]:
        """Several at a time, by `concurrency`."""
        return aio.run(self._ask_all(form, questions, note))

    async def _ask_all(
        self, form: Form, questions: Sequence[list[Message]], note: Note
    ) -> Counter[str]:
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        wire: Counter[str] = Counter()
        failures = 0

        async def sent(_: object) -> None:
            wire["requests"] += 1

        async def came(response: Any) -> None:
            wire[str(response.status_code)] += 1

        async def work() -> None:
            nonlocal failures
            for i, question in queue:  # shared by all workers
                verdict = await self._ask(client, form, question)
                note(i, verdict)
                failures = 0 if verdict.preference is not None else failures + 1
                if failures == HOPELESS:
                    raise self._unusable(f"{failures} questions in a row failed: {verdict.reason}")

        queue = iter(enumerate(questions))
        async with AsyncOpenAI(
            api_key=self._key(),
            base_url=self.url.removesuffix("/chat/completions"),
            timeout=self.timeout,
            max_retries=self.retries,
            http_client=DefaultAsyncHttpxClient(
                event_hooks={"request": [sent], "response": [came]}
            ),
        ) as client:
            await asyncio.gather(*(work() for _ in range(self.concurrency)))
        return wire

    async def _ask(self, client: AsyncOpenAI, form: Form, question: list[Message]) -> Verdict:
        import openai

        refused = openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError
        messages: Any = question
        for asked in range(1, ASKED + 1):
            answer = None
            try:
                response = await client.chat.completions.with_raw_response.create(
                    model=self.model, messages=messages, **form.options
                )
            except refused as e:
                raise self._unusable(self._reason(e)) from e
            except openai.OpenAIError as e:
                return Verdict(None, asked, None, self._reason(e))
            try:
                answer = response.http_response.json()["choices"][0]
                return Verdict(form.read(answer), asked, answer)
            except STUMBLES:
                said = response.http_response.text if answer is None else _said(answer)
        return Verdict(None, asked, answer, f"unreadable answer {said!r:.80}")

    def _key(self) -> str:
        key = os.environ.get(self.key_variable)
        if not key and urlsplit(self.url).hostname == "api.openai.com":
            raise JudgeError(
                f"{self.key_variable} is not set, so {self.model} would refuse every question. "
                f"Set the environment variable {self.key_variable} to your key."
            )
        return key or "none"

    def _reason(self, error: Exception) -> str:
        """The kind of error and the first line that the server said, without the key."""
        text = f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.200}"
        return text.replace(os.environ.get(self.key_variable) or "\0", "***")

    def _unusable(self, reason: str) -> JudgeError:
        place = self.record["server"]
        return JudgeError(
            f"the judge {self.model} at {place} cannot be used ({reason}): the pairs that are "
            f"left stay without a verdict. Check --judge-url (most end in /v1), --judge-model and "
            f"{self.key_variable}, then go on with --resume."
        )


def _said(answer: Any) -> Any:
    """What was said in a choice that could not be read, as far as there is anything."""
    try:
        return answer["message"]["content"]
    except STUMBLES:
        return answer
