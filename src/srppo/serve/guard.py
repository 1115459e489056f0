"""What every request passes before the application sees it: its sender, size and time."""

from __future__ import annotations

import asyncio
import hmac
from collections import Counter

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from srppo.serve.limits import Limits

OPEN = "/health"
"""The one path that needs no token: it tells nothing but whether the server lives."""
BODIES_AT_ONCE = 16
"""Bodies of the largest size that may be held in memory together."""


class RefusedError(Exception):
    """An answer other than 200; `str` is what the client is told, as JSON."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def response(self, closing: bool = False) -> JSONResponse:
        """`closing`: the connection ends with it, and no more of the request is read."""
        headers = self.headers | ({"connection": "close"} if closing else {})
        return JSONResponse({"error": str(self)}, self.status, headers)


class Guard:
    """ASGI middleware: asks for the token, reads the body within its limits, counts answers."""

    def __init__(self, app: ASGIApp, limits: Limits, token: str | None) -> None:
        self.app = app
        self.answers: Counter[int] = Counter()
        """How many of each HTTP status."""
        self._limits = limits
        self._token = token.encode() if token is not None else None
        self._held = 0  # bytes of all bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.answers[message["status"]] += 1
            await send(message)

        body = bytearray()
        try:
            self._admit(scope)
            if await self._read(body, receive):
                await self.app(scope, _replayed(body, receive), counted)
        except RefusedError as refused:
            await refused.response(closing=True)(scope, receive, counted)
        finally:
            self._held -= len(body)

    def _admit(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self._token is not None and scope["path"] != OPEN:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            known = hmac.compare_digest(given.strip().encode(), self._token)
            if scheme.lower() != "bearer" or not known:
                raise RefusedError(
                    401,
                    "this server answers only with its token. Send the header "
                    "'Authorization: Bearer TOKEN', with the token that it was started with.",
                    www_authenticate="Bearer",
                )
        if int(headers.get("content-length", 0)) > self._limits.body_bytes:
            raise self._too_large()

    async def _read(self, body: bytearray, receive: Receive) -> bool:
        """False: the client has gone."""
        try:
            async with asyncio.timeout(self._limits.patience):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return False
                    body += message.get("body", b"")
                    self._held += len(message.get("body", b""))
                    if len(body) > self._limits.body_bytes:
                        raise self._too_large()
                    if self._held > BODIES_AT_ONCE * self._limits.body_bytes:
                        raise RefusedError(
                            503, "too many large requests at once. Try again.", retry_after="1"
                        )
                    if not message.get("more_body", False):
                        return True
        except TimeoutError:
            raise RefusedError(
                408,
                f"the request's body did not arrive within {self._limits.patience:g} seconds: it "
                "was not read to its end. Send it in one go.",
            ) from None

    def _too_large(self) -> RefusedError:
        return RefusedError(
            413,
            f"the request's body is larger than {self._limits.body_bytes} bytes, room for "
            f"{self._limits.queue_tokens} tokens: it was not read. Send fewer sequences at a time.",
        )


def _replayed(body: bytearray, receive: Receive) -> Receive:
    """The body as one message, then whatever the server has to say: that the client has gone."""
    whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

    async def next_message() -> Message:
        return whole.pop() if whole else await receive()

    return next_message
