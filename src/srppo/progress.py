"""What a run says while it works: bars in a terminal, plain lines without one."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

Advance = Callable[[int], None]
VISIBLE = (
    {i: chr(0x2400 + i) for i in range(32) if chr(i) not in "\n\t"}
    | {0x7F: "␡"}
    | dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], "\N{REPLACEMENT CHARACTER}")
)
"""For `str.translate`: what a model says, or data, must not steer the terminal."""


class _Rate(ProgressColumn):
    """Units per second, from rich's own estimate."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "", style="dim")


class Reporter:
    """Bars and lines on stderr. `quiet` says nothing at all."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = console(stderr=True, quiet=quiet, soft_wrap=True)
        self._live: Progress | None = None

    def line(self, text: str) -> None:
        """One line, above any running bar."""
        self.console.print(text)

    @contextmanager
    def bar(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
        """A bar with rate and remaining time, `done` units of it filled before; yields a function
        that advances it by n units.

        Without a terminal: a line at most every ten seconds. A bar inside a bar is drawn below it.
        """
        if not self.console.is_terminal:
            yield self._plain(name, total, unit, done)
            return
        outer = self._live
        live = outer or Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}", markup=False),
            _Rate(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        task = live.add_task(name, total=total, unit=unit, completed=done)
        if outer is not None:
            try:
                yield lambda n: live.advance(task, n)
            finally:
                live.remove_task(task)
            return
        self._live = live
        try:
            with live:
                yield lambda n: live.advance(task, n)
        finally:
            self._live = None

    def _plain(self, name: str, total: int, unit: str, before: int) -> Advance:
        started = said = time.monotonic()
        done = before

        def advance(n: int) -> None:
            nonlocal done, said
            done += n
            now = time.monotonic()
            if now - said < 10:
                return
            said = now
            rate = (done - before) / (now - started)
            left = (total - done) / rate
            self.line(f"{name}: {done}/{total} {unit}, {rate:.1f}/s, {left:.0f} s left")

        return advance


def console(**options: Any) -> Console:
    """One that prints paths, names and groups as they are: [x] is no markup, :x: no emoji."""
    return Console(markup=False, emoji=False, highlight=False, **options)


def stdout() -> Console:
    """Where results go; wide enough for a table when it is a file or a pipe."""
    found = console(file=sys.stdout)
    return found if found.is_terminal else console(file=sys.stdout, width=120)
