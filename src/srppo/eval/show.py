"""Scores and checks in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from srppo.eval.benchmarks import BENCHMARKS, Row
from srppo.eval.preflight import Check
from srppo.eval.statistics import widest_difference


def show_results(records: Sequence[Row], console: Console) -> None:
    """Every score with its interval, and beside it how the responses were; then what to know."""
    table = Table(box=None, pad_edge=False)
    for column in ("model", "task", "score"):
        table.add_column(column, overflow="fold")
    for column in ("%", "95% interval", "n", "tokens", "ended", "cut off", "empty", "prompts cut"):
        table.add_column(column, justify="right")
    for record in records:
        name = record["model"]["name"]
        for task, entry in record["tasks"].items():
            where = [name, task]
            went = _went(entry)
            for metric, found in entry["metrics"].items():
                table.add_row(*where, metric, *_score(found), *went)
                where, went = ["", ""], []
    console.print(table)
    for record in records:
        name = record["model"]["name"]
        for task, entry in record["tasks"].items():
            for note in [*_floor(task), *entry["notes"]]:
                console.print(f"{name}, {task}: {note}")
        for task, message in record["failed"].items():
            console.print(f"{name}, {task} FAILED: {message}")
    if sizes := {
        found["n"] for r in records for t in r["tasks"].values() for found in t["metrics"].values()
    }:
        console.print(_noise(min(sizes), max(sizes)))


def show_checks(checks: Sequence[Check], console: Console) -> None:
    """What was looked at, a line each."""
    table = Table(box=None, pad_edge=False)
    for column in ("check", "", "found"):
        table.add_column(column, overflow="fold")
    for check in checks:
        state = {"ok": ("ok", "green"), "note": ("note", "yellow"), "problem": ("PROBLEM", "red")}
        table.add_row(check.what, Text(*state[check.state]), check.says)
    console.print(table)


def written(directories: Sequence[Path]) -> str:
    """Where it all is."""
    return "Results: " + ", ".join(map(str, directories))


def _score(metric: Row) -> list[str]:
    low, high = metric["low"], metric["high"]
    interval = "" if low is None else f"{100 * low:.1f} to {100 * high:.1f}"
    return [f"{100 * metric['value']:.1f}", interval, str(metric["n"])]


def _went(entry: Row) -> list[str]:
    length, eos = entry["mean_length"], entry["eos_rate"]
    counts = (entry[key] for key in ("truncated_responses", "empty", "truncated_prompts"))
    return [
        "" if length is None else f"{length:.1f}",
        "" if eos is None else f"{100 * eos:.0f}%",
        *("" if n is None else str(n) for n in counts),
    ]


def _noise(fewest: int, most: int) -> str:
    below, least = (f"{100 * widest_difference(n):.1f}" for n in (fewest, most))
    more = f", with {most} one below {least}" if most > fewest else ""
    return (
        f"With {fewest} question{'s' * (fewest > 1)} a difference below {below} points can be "
        f"chance{more} (95%, scores near 50%, models independent); `srppo compare` pairs the "
        "questions."
    )


def _floor(task: str) -> list[str]:
    floor = BENCHMARKS[task].floor if task in BENCHMARKS else None
    return [] if floor is None else [f"guessing gives {100 * floor:.0f}%"]
