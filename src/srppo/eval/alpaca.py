"""AlpacaEval 2: how often a judge prefers a model's responses to GPT-4 Turbo's.

The figures are alpaca-eval's own (`get_winrate`, `get_length_controlled_winrate`). Ours is what
they take for granted: each instruction once and under its number in the benchmark.

Source: arXiv:2404.04475; alpaca-eval 0.6.6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scipy import stats

from srppo.errors import DataError
from srppo.eval.length_control import length_controlled
from srppo.eval.references import (
    REFERENCE_JUDGE,
    References,
    Row,
    named,
    own_references,
    place,
    require_alpaca_eval,
    sha256_of,
)
from srppo.eval.statistics import Estimate, mean

if TYPE_CHECKING:
    from pandas import DataFrame, Series

Scored = tuple[dict[str, Any], list[Row]]
"""A task's entry of results.json, and its samples."""

WIN_RATE, LENGTH_CONTROLLED = "win_rate", "length_controlled_win_rate"


def score_annotations(
    rows: Sequence[Row],
    references: References | None,
    data_dir: Path | None = None,
    offline: bool = False,
) -> Scored:
    """Both win rates of judged pairs, in alpaca-eval's own format and in any order.

    Args:
        rows: `preference` is 1 where output_1, the reference, is better, 2 where output_2, the
            model's, is; between them a probability; 0 or 1.5 for a draw; null: not judged.
        references: None: the win rate alone, over all instructions of the rows.
        data_dir: where df_gamed.csv may lie.
        offline: never ask the hub for it.

    Raises:
        DataError: rows of several models, judges or baselines, or nothing judged.
        ConfigError: alpaca-eval is not installed.
    """
    require_alpaca_eval()
    from alpaca_eval.metrics import get_winrate

    benchmark = references or own_references(rows)
    placed = place(rows, benchmark)
    frame = _frame(placed.rows, benchmark)
    names = {key: _only(key, frame[key]) for key in ("annotator", "generator_1", "generator_2")}
    notes = list(placed.notes)
    judge = names["annotator"]
    if judge is None:
        judge = REFERENCE_JUDGE
        notes.append(f"no row names its judge: taken to be {REFERENCE_JUDGE}")
    judged = frame[frame["preference"].notna()]
    if judged.empty:
        raise DataError(
            f"none of {len(frame)} pair(s) has a preference between 1 and 2: there is no win rate. "
            "Have them judged: --judge-url and --judge-model, with --resume."
        )
    if len(judged) < len(frame):
        lost = frame.loc[frame["preference"].isna(), "instruction"]
        notes.append(f"{len(lost)} of {len(frame)} pairs were not judged{named(list(lost))}")

    counts = get_winrate(frame)
    shares = (judged["preference"] - 1).tolist()
    label = WIN_RATE if judge == REFERENCE_JUDGE else f"{WIN_RATE}@{judge}"
    value, stderr = float(counts["win_rate"]) / 100, float(counts["standard_error"]) / 100
    metrics = {label: _metric(replace(mean(shares), value=value, stderr=stderr), "mean")}
    columns = {label: shares}

    controlled = length_controlled(frame, judge, benchmark, data_dir, offline)
    notes += controlled.notes
    if controlled.shares is not None:
        estimate = _reference_estimate(controlled.shares)
        metrics = {LENGTH_CONTROLLED: _metric(estimate, "reference"), **metrics}
        columns[LENGTH_CONTROLLED] = controlled.shares[judged.index].tolist()
    samples = _samples(judged, columns)
    task = {
        "version": "2",
        "n": len(judged),
        "headline": next(iter(metrics)),
        "metrics": metrics,
        "template": None,
        "template_sha256": None,
        "data_sha256": benchmark.sha256,
        "prompts_sha256": sha256_of("\n".join(row["prompt_sha256"] for row in samples)),
        "mean_length": None,
        "eos_rate": None,
        "truncated_responses": None,
        "truncated_prompts": None,
        "empty": int((frame["output_2"].str.strip() == "").sum()),
        "settings": {
            "judge": judge,
            "baseline": names["generator_1"],
            "wins": int(counts["n_wins"]),
            "losses": int(counts["n_wins_base"]),
            "draws": int(counts["n_draws"]),
            "discrete_win_rate": float(counts["discrete_win_rate"]) / 100,
            "mean_characters": float(frame["output_2"].str.len().mean()),
            "mean_characters_baseline": float(frame["output_1"].str.len().mean()),
        },
        "notes": notes,
    }
    return task, samples


def _frame(rows: dict[int, Row], references: References) -> DataFrame:
    """The columns that alpaca-eval reads, under the instructions' numbers; NaN: not judged."""
    from pandas import DataFrame

    columns = ("generator_1", "generator_2", "annotator", "glm_preference")
    return DataFrame(
        [
            {
                "instruction": references.outputs[i]["instruction"],
                "preference": _preference(row),
                "output_1": _output(row, "output_1"),
                "output_2": _output(row, "output_2"),
                **{key: row.get(key) for key in columns},
            }
            for i, row in rows.items()
        ],
        index=list(rows),
    )


def _output(row: Row, key: str) -> str:
    """Text; none is an empty one."""
    value = row.get(key)
    if not isinstance(value, str | None):
        raise DataError(
            f"{key} {value!r:.40} is no text: that pair cannot be scored. Put the response itself "
            "there, in quotes."
        )
    return value or ""


def _preference(row: Row) -> float:
    """Between 1 and 2; NaN where there is none, as alpaca-eval, too, drops it."""
    value = row.get("preference")
    if value is None:
        return float("nan")
    try:
        number = float(value) or 1.5
    except (TypeError, ValueError) as e:
        raise DataError(
            f"preference {value!r} is no number: that pair cannot be scored. It is 1 where "
            "output_1 is better, 2 where output_2 is, or null."
        ) from e
    return number if 1 <= number <= 2 else float("nan")


def _only(key: str, column: Series) -> str | None:
    """The one name in a column; None where there is none."""
    names = sorted(map(str, column.dropna().unique()))
    if len(names) > 1:
        raise DataError(
            f"{key} is {len(names)} different names ({', '.join(names[:3])}): their pairs "
            "would be mixed in one figure. Give the annotations of one alone."
        )
    return names[0] if names else None


def _samples(judged: DataFrame, columns: dict[str, list[float]]) -> list[Row]:
    return [
        {
            "doc_id": int(i),
            "prompt_sha256": sha256_of(prompt),
            "prompt": prompt,
            "response": response,
            "length": None,
            "ended": None,
            "scores": {name: values[k] for name, values in columns.items()},
        }
        for k, (i, prompt, response) in enumerate(
            zip(judged.index, judged["instruction"], judged["output_2"], strict=True)
        )
    ]


def _reference_estimate(shares: Series) -> Estimate:
    """Mean and standard error as alpaca-eval takes them; a normal interval, if they differ."""
    value, stderr = float(shares.mean()), float(shares.sem())
    if not stderr:
        return mean(shares)
    half = float(stats.norm.ppf(0.975)) * stderr
    return Estimate(value, stderr, value - half, value + half, len(shares))


def _metric(estimate: Estimate, kind: str) -> dict[str, Any]:
    return {**asdict(estimate), "kind": kind}
