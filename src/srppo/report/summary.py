"""Several runs of one recipe with different seeds: means, intervals, paired differences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import t as student_t

from srppo.errors import ConfigError
from srppo.report.read import mapping, read
from srppo.report.terminal import changed_on_the_way

Key = tuple[str, str]  # model, decoding
Columns = dict[str, list[float]]  # column -> one value a run


@dataclass(frozen=True)
class Interval:
    """Mean over runs and half the width of its 95% interval (Student's t, n - 1)."""

    mean: float
    half: float

    @staticmethod
    def of(values: list[float]) -> Interval:
        """One run gives no interval: its half-width is NaN."""
        n = len(values)
        mean = math.fsum(values) / n
        if n < 2:
            return Interval(mean, math.nan)
        variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
        return Interval(mean, float(student_t.ppf(0.975, n - 1)) * math.sqrt(variance / n))

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if math.isnan(self.half) else f"{self.mean:.3f}±{self.half:.3f}"


def summarise(run_dirs: list[Path], against: str = "policy") -> str:
    """Markdown: every model's scores over the runs, then `against` minus each, paired by run.

    The figures at a row are means over runs with 95% intervals; response length in tokens and
    the EOS rate are means over the groups. Runs that were changed on their way are named below.

    Raises:
        ConfigError: a run without results, or runs that did not measure the same things.
    """
    runs = [_columns(path) for path in run_dirs]
    for path, run in zip(run_dirs[1:], runs[1:], strict=True):
        if odd := _measured(run) ^ _measured(runs[0]):
            raise ConfigError(
                f"{path} and {run_dirs[0]} did not measure the same: {' / '.join(min(odd))} is in "
                "one of them only, so they cannot be averaged. Summarise runs of one recipe."
            )
    _require_one_recipe(run_dirs)
    keys = list(runs[0])
    names = list(runs[0][keys[0]])
    table: dict[Key, Columns] = {k: {c: [run[k][c] for run in runs] for c in names} for k in keys}
    scores = [c for c in names if c not in ("length", "EOS")]
    lines = [f"{len(runs)} runs, mean ± 95% interval over runs.", ""]
    lines += _markdown(["model", "decoding", *names])
    lines += [_row([*key, *(str(Interval.of(table[key][c])) for c in names)]) for key in keys]
    lines += ["", f"`{against}` minus the row, paired by run; * where the interval excludes 0:", ""]
    lines += _markdown(["model", "decoding", *scores])
    for model, decoding in keys:
        reference = table.get((against, decoding))
        if model == against or reference is None:
            continue
        cells = []
        for c in scores:
            pairs = zip(reference[c], table[model, decoding][c], strict=True)
            difference = Interval.of([a - b for a, b in pairs])
            cells.append(f"{difference}{'*' if abs(difference.mean) > difference.half else ''}")
        lines.append(_row([model, decoding, *cells]))
    said = [(path, line) for path in run_dirs for line in changed_on_the_way(read(path).run)]
    lines += [""] * bool(said) + [f"- {path}: {line}" for path, line in said]
    return "\n".join(lines) + "\n"


def _columns(path: Path) -> dict[Key, dict[str, float]]:
    """(model, decoding) -> column -> value."""
    results = read(path).results
    if not results or not results.get("rows"):
        raise ConfigError(
            f"{path} holds no results: it cannot be part of a summary. Finish it with `srppo run`."
        )
    table: dict[Key, dict[str, float]] = {}
    rows: list[dict[str, Any]] = results["rows"]
    for row in rows:
        columns = table.setdefault((row["model"], row["decoding"]), {})
        for name, value in mapping(row, "scores").items():
            columns[f"{name} {row['group']}"] = value
        if not row["scores"]:
            columns[f"reward {row['group']}"] = row["reward"]
    for (model, decoding), columns in table.items():
        mine = [r for r in rows if (r["model"], r["decoding"]) == (model, decoding)]
        columns["length"] = math.fsum(r["response_length"] for r in mine) / len(mine)
        columns["EOS"] = math.fsum(r["eos_rate"] for r in mine) / len(mine)
    return table


def _require_one_recipe(run_dirs: list[Path]) -> None:
    """Only seed, base model and place may differ, and every seed counts once."""
    recipes = [mapping(read(path).run, "recipe") for path in run_dirs]
    seeds = [recipe.get("seed") for recipe in recipes]
    if repeated := {s for s in seeds if s is not None and seeds.count(s) > 1}:
        raise ConfigError(
            f"seed {repeated.pop()} is there more than once: the same run counted twice makes "
            "intervals too narrow. Give each run another seed."
        )
    for path, recipe in zip(run_dirs[1:], recipes[1:], strict=True):
        for key in recipe.keys() - {"seed", "output_dir", "model"}:
            if recipe[key] != recipes[0].get(key):
                raise ConfigError(
                    f"{path} and {run_dirs[0]} differ in {key!r}: a mean over them would mix two "
                    "experiments. Summarise runs that differ in the seed only."
                )


def _measured(run: dict[Key, dict[str, float]]) -> set[tuple[str, str, str]]:
    return {(*key, column) for key, columns in run.items() for column in columns}


def _markdown(names: list[str]) -> list[str]:
    return [_row(names), _row(["---"] * len(names))]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
