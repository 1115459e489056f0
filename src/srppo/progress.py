"""What a run says while it works: bars in a terminal, plain lines without one."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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


class _Rate(ProgressColumn):
    """Units per second, from rich's own estimate."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "", style="dim")


class Reporter:
    """Bars and lines on stderr. `quiet` says nothing at all."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False, quiet=quiet, soft_wrap=True)
        self._live: Progress | None = None

    def line(self, text: str) -> None:
        """One line, above any running bar."""
        self.console.print(text, markup=False)

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
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
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


def stdout() -> Console:
    """Where results go; wide enough for a table when it is a file or a pipe."""
    console = Console(file=sys.stdout, highlight=False)
    return console if console.is_terminal else Console(file=sys.stdout, highlight=False, width=120)
