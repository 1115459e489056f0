"""Connections that do not wait for ever: uvicorn has no limit on the time that headers take, nor
on the time that a client may leave an answer unread."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


def patient(seconds: float) -> type[H11Protocol]:
    """uvicorn's HTTP protocol, with that much patience for each of the two."""

    class PatientProtocol(H11Protocol):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._set_deadline()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._drop_deadline()
            elif self.deadline is None:  # the beginning of another request
                self._set_deadline()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._drop_deadline()
            self._set_deadline()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._drop_deadline()

        def connection_lost(self, exc: Exception | None) -> None:
            self._drop_deadline()
            super().connection_lost(exc)

        def _set_deadline(self) -> None:
            self.deadline = self.loop.call_later(seconds, self.transport.abort)

        def _drop_deadline(self) -> None:
            if self.deadline is not None:
                self.deadline.cancel()
                self.deadline = None

    return PatientProtocol
