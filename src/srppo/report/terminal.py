"""The result table for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.table import Table

from srppo.report.provenance import changes


def result_table(results: dict[str, Any]) -> Table:
    """Models by groups: the scores, joined by slashes, with response length and EOS rate."""
    groups, rows = results["groups"], results["rows"]
    scores = list(rows[0]["scores"]) or ["reward"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", no_wrap=True)
    table.add_column("decoding", no_wrap=True)
    for group in groups:
        table.add_column(f"{group}\n{'/'.join(scores)}", justify="right")
    table.add_column("\ntokens", justify="right")
    table.add_column("\nEOS", justify="right")
    cells = {(r["model"], r["decoding"], r["group"]): r for r in rows}
    for model, decoding in dict.fromkeys((r["model"], r["decoding"]) for r in rows):
        mine = [cells[model, decoding, g] for g in groups]
        table.add_row(
            model,
            decoding,
            *("/".join(f"{r['scores'].get(s, r['reward']):.2f}" for s in scores) for r in mine),
            f"{sum(r['response_length'] for r in mine) / len(mine):.1f}",
            f"{sum(r['eos_rate'] for r in mine) / len(mine):.0%}",
            style="bold" if model == "policy" else None,
        )
    return table


def changed_on_the_way(run: dict[str, Any] | None) -> Iterator[str]:
    """A line for each time that the run of this run.json went on with something else."""
    for at, changed in changes(run):
        yield f"changed on the way, {at}: {'; '.join(changed)}"
