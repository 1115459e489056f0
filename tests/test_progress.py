"""What a run says while it works, with a terminal and without one."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from srppo import progress
from srppo.progress import Reporter


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    return Clock


def test_lines_go_to_stderr_as_they_are(capsys):
    """No markup, no wrapping: brackets in a path or a response are text."""
    Reporter().line("[bold]runs/[x] " + "long " * 60)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "[bold]runs/[x] " + "long " * 60 + "\n"


def test_what_users_name_is_printed_as_it_is(capsys):
    """In tables and bars, too: rich would take [/x] for markup and :x: for an emoji."""
    table = Table("[/head]")
    table.add_row("[/x] :smile:")
    progress.stdout().print(table, "runs/[/x]", "[bold]")
    out = capsys.readouterr().out
    assert all(words in out for words in ("[/head]", "[/x] :smile:", "runs/[/x]", "[bold]"))
    reporter = Reporter()
    reporter.console = progress.console(file=io.StringIO(), force_terminal=True)
    with reporter.bar("[/x]", 3, "steps") as advance:
        advance(1)
    assert "[/x]" in reporter.console.file.getvalue()


def test_a_quiet_reporter_says_nothing(capsys):
    reporter = Reporter(quiet=True)
    reporter.line("hello")
    with reporter.bar("PPO", 3, "steps") as advance:
        advance(3)
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_a_bar_is_a_line_every_ten_seconds(clock, capsys):
    with Reporter().bar("SFT", 40, "steps") as advance:
        for _ in range(30):
            clock.now += 1.0
            advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "SFT: 10/40 steps, 1.0/s, 30 s left",
        "SFT: 20/40 steps, 1.0/s, 20 s left",
        "SFT: 30/40 steps, 1.0/s, 10 s left",
    ]


def test_a_bar_that_is_done_soon_says_nothing(clock, capsys):
    with Reporter().bar("audit", 5, "responses") as advance:
        clock.now += 9.0
        advance(5)
    assert capsys.readouterr().err == ""


def terminal():
    reporter = Reporter()
    screen = io.StringIO()
    reporter.console = Console(file=screen, force_terminal=True, width=100)
    return reporter, screen


def test_in_a_terminal_a_bar_in_a_bar_is_drawn_below_it():
    reporter, screen = terminal()
    with reporter.bar("PPO", 2, "steps") as advance:
        with reporter.bar("evaluation", 4, "responses") as inner:
            inner(4)
            reporter.line("a line above")
        drawn = screen.getvalue()
        advance(2)
    last = screen.getvalue()[len(drawn) :]
    assert drawn.index("a line above") < drawn.rindex("PPO") < drawn.rindex("evaluation")
    assert "2/2" in last
    assert "evaluation" not in last


def test_a_bar_goes_away_when_its_work_fails():
    """A second bar could not be drawn while the first is still on the screen."""
    reporter, screen = terminal()
    with pytest.raises(KeyError), reporter.bar("PPO", 2, "steps"):
        raise KeyError
    with reporter.bar("SFT", 1, "steps") as advance:
        advance(1)
        reporter.line("done")
    assert "SFT" in screen.getvalue()
