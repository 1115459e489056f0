"""AlpacaEval 2: how often a judge prefers a model's responses to GPT-4 Turbo's.

The figures are alpaca-eval's own (`get_winrate`, `get_length_controlled_winrate`). Ours is what
they take for granted: each instruction once and under its number in the benchmark, for the length
control looks up an instruction's difficulty by its place.

Source: arXiv:2404.04475; alpaca-eval 0.6.6.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from scipy import stats

from srppo.errors import DataError
from srppo.eval.references import (
    REFERENCE_JUDGE,
    REFERENCES,
    References,
    Row,
    gamed_file,
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
    value, stderr = counts["win_rate"] / 100, counts["standard_error"] / 100
    metrics = {label: _metric(replace(mean(shares), value=value, stderr=stderr), "mean")}
    columns = {label: shares}

    controlled = _length_controlled(frame, judge, benchmark, data_dir, offline)
    if isinstance(controlled, str):
        notes.append(f"no length-controlled win rate: {controlled}")
    else:
        estimate, values = controlled
        metrics = {LENGTH_CONTROLLED: _metric(estimate, "reference"), **metrics}
        columns[LENGTH_CONTROLLED] = values[judged.index].tolist()
        if len(frame) < len(benchmark):
            notes.append("the leaderboard's length-controlled win rates are over all instructions")
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


def _length_controlled(
    frame: DataFrame, judge: str, references: References, data_dir: Path | None, offline: bool
) -> tuple[Estimate, Series] | str:
    """The estimate and each row's part in it; or why there is none."""
    import sklearn
    from alpaca_eval.metrics import glm_winrate
    from pandas import read_csv

    reference_outputs = [references.outputs[i]["output"] for i in frame.index]
    same_baseline = frame["output_1"] == reference_outputs
    delta = frame["output_1"].str.len() - frame["output_2"].str.len()
    if judge != REFERENCE_JUDGE:
        return f"it is calibrated for the preferences of {REFERENCE_JUDGE}, these are {judge}'s"
    if references.sha256 is None:
        return (
            "without AlpacaEval's reference outputs the instructions' numbers are not known; give "
            f"--data-dir with alpaca_eval/{REFERENCES[0]}"
        )
    if same_baseline.mean() < 0.5:
        return "it is calibrated against GPT-4 Turbo's outputs, output_1 holds others"
    try:
        gamed = gamed_file(data_dir, offline)
        difficulty = read_csv(gamed).drop_duplicates("index")["index"]
    except (DataError, KeyError, ValueError) as e:
        return str(e)
    if not frame.index.isin(difficulty[difficulty == difficulty.index]).all():
        return f"{gamed.name} does not hold the difficulty of every instruction in order"

    is_baseline = bool((frame["output_1"] == frame["output_2"]).all())
    if not (is_baseline or delta.std() > 0):
        return "all responses differ in length from the baseline's by the same amount"
    # alpaca-eval tells the baseline itself by its name, and takes each row's number for its place.
    ours = frame.assign(generator_1="baseline", generator_2="baseline" if is_baseline else "model")
    with (
        mock.patch.object(glm_winrate, "hf_hub_download", return_value=str(gamed)),
        sklearn.config_context(),  # it sets a global option
        warnings.catch_warnings(action="ignore"),  # scikit-learn's, about its own arguments
    ):
        found = glm_winrate.get_length_controlled_winrate(
            ours, save_weights_dir=None, is_warn_extreme_changes=False
        )
    value, stderr = found["length_controlled_winrate"] / 100, found["lc_standard_error"] / 100
    half = float(stats.norm.ppf(0.975)) * stderr
    estimate = Estimate(float(value), float(stderr), value - half, value + half, len(frame))
    return estimate, ours["glm_preference"]


def _frame(rows: dict[int, Row], references: References) -> DataFrame:
    """The columns that alpaca-eval reads, under the instructions' numbers; NaN: not judged."""
    from pandas import DataFrame

    columns = ("output_1", "output_2", "generator_1", "generator_2", "annotator")
    frame = DataFrame(
        [
            {
                "instruction": references.outputs[i]["instruction"],
                "preference": _preference(row),
                **{key: row.get(key) for key in columns},
            }
            for i, row in rows.items()
        ],
        index=list(rows),
    )
    return frame.assign(
        output_1=frame["output_1"].fillna(""), output_2=frame["output_2"].fillna("")
    )


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


def _metric(estimate: Estimate, kind: str) -> dict[str, Any]:
    return {**asdict(estimate), "kind": kind}
