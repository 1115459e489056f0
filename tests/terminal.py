"""A program in a pseudo-terminal, as a person would use it."""

from __future__ import annotations

import codecs
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from fcntl import ioctl
from struct import pack

PATIENCE = 120.0
"""Seconds until a program that says nothing counts as stuck."""


class Terminal:
    """`python -m srppo ...` with a terminal of its own."""

    def __init__(self, *arguments: object, columns: int = 100) -> None:
        self.screen, theirs = pty.openpty()
        ioctl(theirs, termios.TIOCSWINSZ, pack("HHHH", 40, columns, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "srppo", *map(str, arguments)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            preexec_fn=lambda: _own_terminal(theirs),
            env={**os.environ, "TERM": "xterm", "COLUMNS": str(columns), "PYTHONUNBUFFERED": "1"},
        )
        os.close(theirs)
        self.everything = ""
        self.decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        """A character may arrive in two pieces."""

    def read_until(self, words: str, meanwhile: str = "") -> str:
        """What appears up to these words, colours and cursor movements left out.

        `meanwhile` is pressed after every second of silence: Python's line editor sees a signal
        that comes just before it waits for a key only with the next one.
        """
        found = ""
        until = time.monotonic() + PATIENCE
        while words not in plain(found):
            ready, _, _ = select.select([self.screen], [], [], 1.0)
            if not ready and time.monotonic() > until:
                raise TimeoutError(f"waited for {words!r}, saw {plain(found)!r}")
            if not ready:
                self.press(meanwhile)
                continue
            try:
                piece = os.read(self.screen, 4096)
            except OSError:  # Linux: the other end is closed
                piece = b""
            if not piece:
                raise EOFError(f"waited for {words!r}, saw {plain(found)!r}")
            text = self.decode(piece)
            found += text
            self.everything += text
        return plain(found)

    def type(self, line: str) -> None:
        """Type a line and press return."""
        self.press(line + "\r")

    def press(self, keys: str) -> None:
        """Control characters included: `\\x03` is Ctrl-C, `\\x04` Ctrl-D."""
        os.write(self.screen, keys.encode())

    def end(self) -> int:
        """The exit code of a program that is about to leave."""
        while True:
            try:
                piece = os.read(self.screen, 4096)
            except OSError:
                piece = b""
            if not piece:
                return self.process.wait(PATIENCE)
            self.everything += self.decode(piece)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *args: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        os.close(self.screen)


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def _own_terminal(theirs: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it
    os.setsid()
    ioctl(theirs, termios.TIOCSCTTY, 0)
