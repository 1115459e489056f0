"""A comparison of models on benchmarks, as `srppo.eval.compare.compare` returns it, to be read."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from srppo.progress import console
from srppo.report import figures
from srppo.report.figures import SERIES
from srppo.report.numbers import fixed, plain
from srppo.report.read import Json

HEADS = [
    "score",
    "95%",
    "tokens",
    "EOS",
    "cut",
    "diff.",
    "SE",
    "95%",
    "gained",
    "lost",
    "p",
    "Holm",
]

LEGEND = [
    "Scores and EOS in %, differences in points, lengths in tokens; cut: responses that the length "
    "limit ended. gained, lost: questions with a higher, a lower score than {against}.",
    "p: {tests}. Holm: p adjusted for the number of tasks, of each task's first metric.",
    "Intervals are 95% intervals over questions. They do not cover another training seed.",
]


def render(comparison: Json, form: str) -> str:
    """As `table` (plain text), `md`, `json`, `csv` or `html`."""
    return {"table": _text, "md": _markdown, "json": _json, "csv": _csv, "html": _html}[form](
        comparison
    )


def show(comparison: Json, console: Console) -> None:
    """A table a task, what the columns are, and notes."""
    console.width = max(console.width, 110)  # a terminal wraps lines, rich would cut cells
    for task in _tasks(comparison):
        console.print(Text(task["title"], style="bold"))
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column()
        for head in HEADS:
            table.add_column(head, justify="right", no_wrap=True)
        for metric, rows in task["metrics"]:
            table.add_row(Text(metric, style="bold"))
            for row in rows:
                table.add_row(Text(f"  {row['model']}"), *_cells(row))
        console.print(table)
    for line in [*_legend(comparison), "", *comparison["notes"]]:
        console.print(Text(line))


def _text(comparison: Json) -> str:
    out = io.StringIO()
    show(comparison, console(file=out, width=120))
    return out.getvalue()


def _markdown(comparison: Json) -> str:
    lines = []
    for task in _tasks(comparison):
        lines += [f"### {task['title']}", "", _line(["metric", "model", *HEADS])]
        lines.append(_line(["---", "---", *["---:"] * len(HEADS)]))
        for metric, rows in task["metrics"]:
            for i, row in enumerate(rows):
                lines.append(_line(["" if i else metric, row["model"], *_cells(row)]))
        lines.append("")
    notes = [f"- {note}" for note in [*_legend(comparison), *comparison["notes"]]]
    return "\n".join([*lines, *notes]) + "\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _json(comparison: Json) -> str:
    return json.dumps(comparison, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _csv(comparison: Json) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(comparison["rows"][0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(comparison["rows"])
    return out.getvalue()


def _html(comparison: Json) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = [m["name"] for m in comparison["models"]]
    others = [name for name in names if name != comparison["against"]]
    colours = _colours(names)
    return environment.get_template("comparison.html.j2").render(
        against=comparison["against"],
        models=comparison["models"],
        others=[(name, colours[name]) for name in others],
        outcomes=_outcomes(comparison, colours),
        tasks=[
            {
                **t,
                "metrics": [
                    (m, [(r["model"], _cells(r)) for r in rows]) for m, rows in t["metrics"]
                ],
            }
            for t in _tasks(comparison)
        ],
        legend=_legend(comparison),
        notes=comparison["notes"],
    )


def _outcomes(comparison: Json, colours: dict[str, str]) -> list[tuple[str, str, Any]]:
    """(task and metric, differences, picture) of each task's headline; one scale for all."""
    rows = [r for r in comparison["rows"] if r["headline"] and r["difference"] is not None]
    keys = ("difference", "difference_low", "difference_high")
    known = [100 * r[key] for r in rows for key in keys if r[key] is not None]
    reach = (min([*known, -1.0]), max([*known, 1.0]))
    found = []
    for i, (task, group) in enumerate(groupby(rows, lambda r: r["task"])):
        mine = list(group)
        points = [
            (colours[r["model"]], 100 * r["difference"], _x100(r[keys[1]]), _x100(r[keys[2]]))
            for r in mine
        ]
        words = ", ".join(_points(r["difference"]) for r in mine)
        label = f"{task}, difference from {comparison['against']} in points: " + ", ".join(
            f"{r['model']} {_points(r['difference'])}" for r in mine
        )
        name = f"{task}: {_words(mine[0]['metric'])}"
        found.append((name, words, figures.forest(f"forest-{i}", label, points, reach)))
    return found


def _colours(names: list[str]) -> dict[str, str]:
    """base, sft and policy have their own, which the others do not take."""
    free = [s for s in ("policy", "3", "4", "5", "6", "sft", "base") if s not in names]
    others = [name for name in names if name not in SERIES]
    found = {name: free[i % len(free)] for i, name in enumerate(others)}
    return {name: found.get(name, name) for name in names}


def _tasks(comparison: Json) -> Iterator[Json]:
    """Title and (metric, rows) of each task."""
    for task, of_task in groupby(comparison["rows"], lambda r: r["task"]):
        rows = list(of_task)
        versions = " / ".join(dict.fromkeys(r["version"] for r in rows))
        counts = " / ".join(dict.fromkeys(plain(r["n"]) for r in rows))
        templates = " / ".join(dict.fromkeys(r["template"] or "unknown" for r in rows))
        metrics = [
            (_words(metric), list(of_metric))
            for metric, of_metric in groupby(rows, lambda r: r["metric"])
        ]
        title = f"{task}: {counts} questions, version {versions}, template {templates}"
        yield {"task": task, "title": title, "metrics": metrics}


def _cells(row: Json) -> list[str]:
    """As in HEADS."""
    cells = [
        _percent(row["value"]),
        _interval(_percent(row["low"]), _percent(row["high"])),
        fixed(row["mean_length"], 1),
        _percent(row["eos_rate"]),
        plain(row["truncated_responses"]),
    ]
    if row["against"] is None:
        return cells + [""] * (len(HEADS) - len(cells))
    return [
        *cells,
        _points(row["difference"]),
        _percent(row["difference_stderr"]),
        _interval(_points(row["difference_low"]), _points(row["difference_high"])),
        plain(row["gained"]),
        plain(row["lost"]),
        _p(row["p"]),
        _p(row["p_holm"]) if row["headline"] else "",
    ]


def _legend(comparison: Json) -> list[str]:
    tests: dict[str, list[str]] = {}
    for row in comparison["rows"]:
        if row["test"]:
            names = tests.setdefault(row["test"], [])
            names += [n for n in [_words(row["metric"])] if n not in names]
    said = "; ".join(f"{test} ({', '.join(names)})" for test, names in tests.items())
    return [line.format(against=comparison["against"], tests=said) for line in LEGEND]


def _x100(x: float | None) -> float | None:
    return None if x is None else 100 * x


def _percent(x: float | None) -> str:
    return fixed(_x100(x), 1)


def _points(x: float | None) -> str:
    return fixed(_x100(x), 1, sign=True)


def _interval(low: str, high: str) -> str:
    return "–" if "–" in (low, high) else f"{low} to {high}"


def _p(p: float | None) -> str:
    if p is None:
        return "–"
    return "<0.001" if p < 0.001 else "1" if p == 1 else f"{p:.3f}"


def _words(name: str) -> str:
    return name.replace("_", " ")
