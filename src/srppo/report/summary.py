"""Several runs of one recipe with different seeds: means, intervals, paired differences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import t as student_t

from srppo.errors import ConfigError
from srppo.report.read import mapping, number, read
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
    try:
        return _table(results["rows"])
    except (KeyError, TypeError, ValueError) as e:
        raise ConfigError(
            f"{path / 'results.json'} is not whole ({type(e).__name__}: {e}): the run cannot be "
            "part of a summary. Restore the file from a copy, or evaluate anew with `srppo run`."
        ) from e


def _table(rows: list[dict[str, Any]]) -> dict[Key, dict[str, float]]:
    """Raises KeyError, TypeError or ValueError where something of a row is missing."""
    table: dict[Key, dict[str, float]] = {}
    groups: dict[Key, list[dict[str, Any]]] = {}
    for row in rows:
        key = str(row["model"]), str(row["decoding"])
        groups.setdefault(key, []).append(row)
        columns = table.setdefault(key, {})
        scores = row["scores"] or {"reward": row["reward"]}
        for name in dict(scores):
            columns[f"{name} {row['group']}"] = _number(scores, name)
    for key, columns in table.items():
        mine = groups[key]
        columns["length"] = math.fsum(_number(r, "response_length") for r in mine) / len(mine)
        columns["EOS"] = math.fsum(_number(r, "eos_rate") for r in mine) / len(mine)
    return table


def _number(row: dict[str, Any], key: str) -> float:
    value = number(row[key])
    if value is None:
        raise ValueError(f"{key} is {row[key]!r}")
    return value


def _require_one_recipe(run_dirs: list[Path]) -> None:
    """Only seed, base and SFT model and place may differ, and every seed counts once."""
    recipes = [mapping(read(path).run, "recipe") for path in run_dirs]
    seeds = [recipe.get("seed") for recipe in recipes]
    if repeated := {s for s in seeds if s is not None and seeds.count(s) > 1}:
        raise ConfigError(
            f"seed {repeated.pop()} is there more than once: the same run counted twice makes "
            "intervals too narrow. Give each run another seed."
        )
    first = _settings(recipes[0])
    for path, recipe in zip(run_dirs[1:], map(_settings, recipes[1:]), strict=True):
        for key in sorted(recipe.keys() | first.keys()):
            if recipe.get(key) != first.get(key):
                raise ConfigError(
                    f"{path} and {run_dirs[0]} differ in {key!r}: a mean over them would mix two "
                    "experiments. Summarise runs that differ in the seed only."
                )


def _settings(recipe: dict[str, Any]) -> dict[str, Any]:
    """What must be the same: of the models, all but which ones they are."""
    model = {f"model.{key}": value for key, value in mapping(recipe, "model").items()}
    placed = ("name", "seed", "output_dir", "model", "model.base", "model.sft")
    return {key: value for key, value in {**recipe, **model}.items() if key not in placed}


def _measured(run: dict[Key, dict[str, float]]) -> set[tuple[str, str, str]]:
    return {(*key, column) for key, columns in run.items() for column in columns}


def _markdown(names: list[str]) -> list[str]:
    return [_row(names), _row(["---"] * len(names))]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
