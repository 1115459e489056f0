"""AlpacaEval's win rate had the responses been as long as the baseline's, by alpaca-eval's own fit.

The fit looks up an instruction's difficulty by the row's place, so rows come under their
instruction's number; and it is refused where its figure would mean something else.

Source: arXiv:2404.04475.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from srppo.errors import DataError
from srppo.eval.references import REFERENCE_JUDGE, REFERENCES, References, gamed_file

if TYPE_CHECKING:
    from pandas import DataFrame, Series


@dataclass(frozen=True)
class LengthControl:
    """What became of it."""

    shares: Series | None
    """Each row's part in the win rate, between 0 and 1; None: there is none."""
    notes: list[str]


class _RefusedError(ValueError):
    """There is no such fit; the message is the reason."""


def length_controlled(
    frame: DataFrame, judge: str, references: References, data_dir: Path | None, offline: bool
) -> LengthControl:
    """Fitted anew; or, where that cannot be, as alpaca-eval wrote it into the rows.

    Args:
        frame: instruction, preference, output_1, output_2, glm_preference; the index is the
            number of the instruction.
        judge: whose preferences they are.
        references: AlpacaEval's.
        data_dir: where df_gamed.csv may lie.
        offline: never ask the hub for it.
    """
    absent = "no length-controlled win rate: "
    if judge != REFERENCE_JUDGE:
        reason = f"it is calibrated for the preferences of {REFERENCE_JUDGE}, these are {judge}'s"
        return LengthControl(None, [absent + reason])
    theirs = [references.outputs[i]["output"] for i in frame.index]
    if (frame["output_1"] == theirs).mean() < 0.5:
        reason = "it is calibrated against GPT-4 Turbo's outputs, output_1 holds others"
        return LengthControl(None, [absent + reason])
    try:
        shares = _fitted(frame, _gamed(frame, references, data_dir, offline))
    except _RefusedError as e:
        written = frame["glm_preference"].astype(float)
        if written.isna().any():
            return LengthControl(None, [absent + str(e)])
        return LengthControl(
            written,
            [f"length control as alpaca-eval wrote it into the file, not fitted again: {e}"],
        )
    notes = []
    if len(frame) < len(references):
        notes.append("the leaderboard's length-controlled win rates are over all instructions")
    raw = (frame["preference"] - 1).mean()
    if _is_suspicious(100 * raw, 100 * shares.mean()):
        notes.append(
            f"the length control moves the win rate from {raw:.1%} to {shares.mean():.1%}: "
            "alpaca-eval takes that for a sign that its fit has failed"
        )
    return LengthControl(shares, notes)


def _gamed(frame: DataFrame, references: References, data_dir: Path | None, offline: bool) -> Path:
    """df_gamed.csv, if it fits the rows."""
    from pandas import read_csv

    if references.sha256 is None:
        raise _RefusedError(
            "without AlpacaEval's reference outputs the instructions' numbers are not known; give "
            f"--data-dir DIR with alpaca_eval/{REFERENCES[0]}"
        )
    try:
        path = gamed_file(data_dir, offline)
        first = read_csv(path).drop_duplicates("index")["index"]
    except (DataError, KeyError, ValueError) as e:
        raise _RefusedError(str(e)) from e
    if not frame.index.isin(first[first == first.index]).all():
        raise _RefusedError(f"{path.name} does not hold every instruction's difficulty in order")
    return path


def _fitted(frame: DataFrame, gamed: Path) -> Series:
    import sklearn
    from alpaca_eval.metrics import glm_winrate

    is_baseline = bool((frame["output_1"] == frame["output_2"]).all())
    delta = frame["output_1"].str.len() - frame["output_2"].str.len()
    if not (is_baseline or delta.std() > 0):
        raise _RefusedError("all responses differ in length from the baseline's by the same amount")
    # alpaca-eval knows the baseline itself by its name.
    ours = frame.assign(generator_1="baseline", generator_2="baseline" if is_baseline else "model")
    with (
        mock.patch.object(glm_winrate, "hf_hub_download", return_value=str(gamed)),
        sklearn.config_context(),  # it sets a global option
        warnings.catch_warnings(action="ignore"),  # scikit-learn's, about its own arguments
    ):
        glm_winrate.get_length_controlled_winrate(
            ours, save_weights_dir=None, is_warn_extreme_changes=False
        )
    return ours["glm_preference"].astype(float)


def _is_suspicious(raw: float, controlled: float) -> bool:
    """Both in per cent."""
    from alpaca_eval.metrics.glm_winrate import get_is_extreme_changes

    return bool(get_is_extreme_changes(raw, controlled))
