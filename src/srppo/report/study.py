"""A study's runs as tables: means over seeds, and what each model gains over its own SFT model."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srppo.report.read import mapping, read
from srppo.report.study_figure import figure
from srppo.report.summary import Interval
from srppo.train.files import writing


@dataclass(frozen=True)
class Result:
    """A finished run of a study."""

    variant: str
    seed: int
    run_dir: Path


@dataclass(frozen=True, order=True)
class Cell:
    """One number of a run: which."""

    variant: str
    model: str
    decoding: str
    group: str
    score: str


@dataclass(frozen=True)
class Over:
    """A cell over seeds."""

    cell: Cell
    values: dict[int, float]
    """Seed: value."""
    gain: Interval | None
    """Over the SFT model of the same run; None: it is that one, or the base."""

    @property
    def interval(self) -> Interval:
        """Mean and 95% interval over seeds."""
        return Interval.of(list(self.values.values()))


def over_seeds(results: list[Result]) -> list[Over]:
    """Every number of every run, over seeds, in the order in which runs and models come.

    A model that some runs lack, as one whose β the audit did not find, has fewer values.
    """
    table: dict[Cell, dict[int, float]] = {}
    for result in results:
        for cell, value in _cells(result):
            table.setdefault(cell, {})[result.seed] = value
    found = []
    for cell, values in table.items():
        gain = None
        if cell.model not in ("base", "sft"):
            own = table[Cell(cell.variant, "sft", cell.decoding, cell.group, cell.score)]
            gain = Interval.of([value - own[seed] for seed, value in values.items()])
        found.append(Over(cell, values, gain))
    return found


def write_study(name: str, results: list[Result], out: Path) -> str:
    """table.md, .csv, .json and .svg in `out`; what table.md holds."""
    found = over_seeds(results)
    primary = next(iter(mapping(_rows(results[0])[0], "scores")), "reward")
    text = markdown(found, primary)
    files = {
        "table.md": text,
        "table.csv": as_csv(found),
        "table.json": json.dumps(as_json(name, found), indent=1) + "\n",
        "table.svg": figure(found, primary),
    }
    for file, content in files.items():
        with writing(out / file):
            (out / file).write_text(content, encoding="utf-8")
    return text


def markdown(found: list[Over], score: str) -> str:
    """One score: mean ± interval a group, and the gain over the run's own SFT model in brackets."""
    chosen = [over for over in found if over.cell.score == score]
    groups = list(dict.fromkeys(over.cell.group for over in chosen))
    rows: dict[tuple[str, str, str], dict[str, Over]] = {}
    for over in chosen:
        cell = over.cell
        rows.setdefault((cell.variant, cell.model, cell.decoding), {})[cell.group] = over
    lines = [
        f"{score}: mean ± 95% interval over n seeds; in brackets the gain over the SFT model of "
        "the same run, paired by seed, * where its interval excludes 0.",
        "",
        f"| variant | model | decoding | n | {' | '.join(groups)} |",
        "| --- " * (4 + len(groups)) + "|",
    ]
    for (variant, model, decoding), of in rows.items():
        n = max(len(over.values) for over in of.values())
        cells = [_shown(of[group]) for group in groups]
        lines.append(f"| {variant} | {model} | {decoding} | {n} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _shown(over: Over) -> str:
    if over.gain is None:
        return str(over.interval)
    star = "*" if abs(over.gain.mean) > over.gain.half else ""
    return f"{over.interval} ({'+' if over.gain.mean > 0 else ''}{over.gain}{star})"


def as_csv(found: list[Over]) -> str:
    """A line a cell; half is half the width of the 95% interval, NaN with one seed."""
    text = io.StringIO()
    names = ["variant", "model", "decoding", "group", "score", "n", "mean", "half"]
    writer = csv.DictWriter(text, [*names, "gain", "gain_half"], lineterminator="\n")
    writer.writeheader()
    for over in found:
        writer.writerow(
            {
                **vars(over.cell),
                "n": len(over.values),
                **vars(over.interval),
                "gain": over.gain and over.gain.mean,
                "gain_half": over.gain and over.gain.half,
            }
        )
    return text.getvalue()


def as_json(name: str, found: list[Over]) -> dict[str, Any]:
    """The values themselves, by seed."""
    return {"study": name, "cells": [{**vars(o.cell), "values": o.values} for o in found]}


def _rows(result: Result) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = (read(result.run_dir).results or {})["rows"]
    return rows


def _cells(result: Result) -> list[tuple[Cell, float]]:
    """Scores, or the reward where nothing is scored; response length in tokens and EOS rate."""
    return [
        (Cell(result.variant, row["model"], row["decoding"], row["group"], score), value)
        for row in _rows(result)
        for score, value in {
            **(row["scores"] or {"reward": row["reward"]}),
            "response_length": row["response_length"],
            "eos_rate": row["eos_rate"],
        }.items()
    ]
