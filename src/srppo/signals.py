"""SIGINT and SIGTERM: the first ends the work where nothing is lost by it, the second at once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SAME = 0.5
"""Seconds within which two signals are one: many schedulers signal a group and its leader."""


AGAIN = 2.0
"""Seconds after which it is raised again: in a destructor or a callback Python drops it."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM came. No `Exception`, so that nothing on its way takes it for an error."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.exit_code = 128 + number
        """130 for SIGINT, 143 for SIGTERM, as shells have it."""


class _Listener:
    """What is known of the signals of this process."""

    number: int | None = None
    """The signal that came; None: none yet."""
    came: float = 0.0
    grace: float | None = None
    """Seconds for which a signal has to wait; None: it ends the work at once."""

    def hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.number is not None:
            if now - self.came > SAME:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.number, self.came = number, now
        if self.grace is None:
            self.stop()
            return
        # Not by print: the signal may have come in the midst of one.
        os.write(2, b"interrupted: ending the step; once more ends it at once\n")
        signal.setitimer(signal.ITIMER_REAL, max(self.grace, 1e-3))

    def expire(self, number: int, frame: FrameType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Raise what came, if anything did."""
        self.grace = None
        if self.number is not None:
            signal.setitimer(signal.ITIMER_REAL, AGAIN, AGAIN)
            raise Interrupted(self.number)


_listener = _Listener()


@contextmanager
def listening() -> Iterator[None]:
    """SIGINT and SIGTERM raise `Interrupted`, inside this block and in the main thread."""
    global _listener
    outer, _listener = _listener, _Listener()
    kinds = {
        signal.SIGINT: _listener.hear,
        signal.SIGTERM: _listener.hear,
        signal.SIGALRM: _listener.expire,
    }
    before = {number: signal.signal(number, handler) for number, handler in kinds.items()}
    try:
        yield
    finally:
        caught()
        for number, handler in before.items():
            signal.signal(number, handler)
        _listener = outer


def hold(grace: float) -> None:
    """From here on a signal waits for `release`, at most so many seconds; one that came before
    raises `Interrupted` now."""
    _listener.grace = grace
    if _listener.number is not None:
        release()


def came() -> bool:
    """Whether one waits. It may then take as long as it takes to `release` it."""
    caught()
    return _listener.number is not None


def release() -> None:
    """Signals end the work again; one that waited raises `Interrupted`."""
    caught()
    _listener.stop()


def caught() -> None:
    """`Interrupted` has arrived: it is not raised again."""
    signal.setitimer(signal.ITIMER_REAL, 0)
