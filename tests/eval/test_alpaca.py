"""Win rates: against alpaca-eval's functions called plainly, and against numbers by hand."""

from __future__ import annotations

import json
import math
import random
import re
import sys
from pathlib import Path

import pytest

from alpaca import annotations, data_dir, references
from srppo.errors import ConfigError, DataError
from srppo.eval.alpaca import score_annotations
from srppo.eval.annotate import score_stored
from srppo.eval.references import load_references

pytest.importorskip("alpaca_eval")
import pandas as pd
import sklearn
from alpaca_eval.metrics import get_winrate, glm_winrate

N = 60
WIN, LC = "win_rate", "length_controlled_win_rate"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return data_dir(tmp_path_factory.mktemp("data"), N)


def plainly(rows: list[dict] | pd.DataFrame, data: Path, monkeypatch) -> dict[str, float]:
    """alpaca-eval's own answer to the rows as they are."""
    gamed = str(data / "alpaca_eval" / "df_gamed.csv")
    with monkeypatch.context() as patch, sklearn.config_context():
        patch.setattr(glm_winrate, "hf_hub_download", lambda **_: gamed)
        frame = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(rows)
        return glm_winrate.get_length_controlled_winrate(frame, save_weights_dir=None)


def require_same(task: dict, found: dict[str, float]) -> None:
    win, lc = task["metrics"][WIN], task["metrics"][LC]
    assert win["value"] * 100 == pytest.approx(found["win_rate"], rel=1e-12)
    assert win["stderr"] * 100 == pytest.approx(found["standard_error"], rel=1e-12)
    assert lc["value"] * 100 == pytest.approx(found["length_controlled_winrate"], rel=1e-12)
    assert lc["stderr"] * 100 == pytest.approx(found["lc_standard_error"], rel=1e-12)


def by_hand(preferences: list, **columns: object) -> tuple[dict, list[dict]]:
    rows = [
        {**row, "preference": p, **columns}
        for row, p in zip(annotations(len(preferences)), preferences, strict=True)
    ]
    return score_annotations(rows, None, offline=True)


# --- figures -------------------------------------------------------------------------------------


def test_both_win_rates_are_those_of_alpaca_eval(data, monkeypatch):
    rows = annotations(N)
    task, samples = score_stored(rows, data, offline=True)
    require_same(task, plainly(rows, data, monkeypatch))
    assert (task["headline"], task["n"], task["notes"]) == (LC, N, [])
    assert [s["doc_id"] for s in samples] == list(range(N))
    assert [s["scores"][WIN] for s in samples] == [r["preference"] - 1 for r in rows]
    mean = sum(s["scores"][LC] for s in samples) / N
    assert mean == pytest.approx(task["metrics"][LC]["value"])
    json.dumps(task, allow_nan=False)


def test_the_order_of_the_rows_does_not_matter_though_to_alpaca_eval_it_does(data, monkeypatch):
    rows = annotations(N)
    mixed = random.Random(0).sample(rows, N)
    task, samples = score_stored(mixed, data, offline=True)
    require_same(task, plainly(rows, data, monkeypatch))
    assert [s["doc_id"] for s in samples] == list(range(N))
    assert plainly(mixed, data, monkeypatch)["length_controlled_winrate"] != pytest.approx(
        task["metrics"][LC]["value"] * 100, abs=0.01
    )


@pytest.mark.parametrize(
    ("preferences", "n", "expected"),
    [
        ([2, 2, 2], 3, 1.0),  # output_2 is the model's
        ([1, 1, 1], 3, 0.0),
        ([1.5, 1.5], 2, 0.5),
        ([0, 0, 2, 2], 4, 0.75),  # an old way to write a draw
        ([2, 1, 1.25, 1.75], 4, 0.5),
        ([2, 2, 1, 1.5], 4, 0.625),
        ([2.0, None, 1.0, 2.0], 3, 2 / 3),
        ([2.0, -1, 7, 1.0], 2, 0.5),  # no preferences
    ],
)
def test_win_rates_by_hand(preferences, n, expected):
    task, samples = by_hand(preferences)
    assert task["metrics"][WIN]["value"] == pytest.approx(expected)
    assert task["metrics"][WIN]["n"] == task["n"] == len(samples) == n


def test_the_standard_error_by_hand():
    """Wins 1, 1, 0, 0.5: variance 0.6875 / 3, n 4."""
    task, _ = by_hand([2, 2, 1, 1.5])
    assert task["metrics"][WIN]["stderr"] == pytest.approx(math.sqrt(0.6875 / 3 / 4))
    counts = [task["settings"][key] for key in ("wins", "losses", "draws", "discrete_win_rate")]
    assert counts == [2, 1, 1, 0.625]


def test_turning_the_outputs_around_turns_the_win_rate_around():
    preferences = [row["preference"] for row in annotations(9)]
    there, back = by_hand(preferences)[0], by_hand([3 - p for p in preferences])[0]
    total = there["metrics"][WIN]["value"] + back["metrics"][WIN]["value"]
    assert total == pytest.approx(1)
    assert there["metrics"][WIN]["stderr"] == pytest.approx(back["metrics"][WIN]["stderr"])


def test_the_baseline_itself_has_half(data, monkeypatch):
    """By its texts: names may be given twice, or otherwise."""
    rows = annotations(N)
    own = [
        {**r, "output_2": r["output_1"], "generator_2": r["generator_1"], "preference": 1.5}
        for r in rows
    ]
    task, _ = score_stored(own, data, offline=True)
    require_same(task, plainly(own, data, monkeypatch))
    assert task["metrics"][LC]["value"] == 0.5
    renamed = [{**r, "generator_2": "copy"} for r in own]
    assert score_stored(renamed, data, offline=True)[0]["metrics"] == task["metrics"]
    namesake = [{**r, "generator_2": r["generator_1"]} for r in rows]
    require_same(score_stored(namesake, data, offline=True)[0], plainly(rows, data, monkeypatch))


# --- rows that are not all there -----------------------------------------------------------------


def test_pairs_without_a_preference_count_as_alpaca_eval_counts_them(data, monkeypatch):
    rows = annotations(N)
    rows[3]["preference"] = rows[40]["preference"] = None
    task, samples = score_stored(rows, data, offline=True)
    require_same(task, plainly(rows, data, monkeypatch))
    assert (task["n"], len(samples)) == (N - 2, N - 2)
    (note,) = task["notes"]
    assert note.startswith(f"2 of {N} pairs were not judged: 'Question 3:")


def test_missing_rows_do_not_shift_the_difficulty_of_the_others(data, monkeypatch):
    """Of the first 40 the place is the number, so alpaca-eval can be asked."""
    task, _ = score_stored(annotations(N)[:40], data, offline=True)
    require_same(task, plainly(annotations(N)[:40], data, monkeypatch))
    assert any(note.startswith(f"20 of {N} instructions have no row") for note in task["notes"])

    rows = annotations(N)
    del rows[5]
    task, samples = score_stored(rows, data, offline=True)
    shifted = plainly(rows, data, monkeypatch)["length_controlled_winrate"] / 100
    whole = plainly(annotations(N), data, monkeypatch)["length_controlled_winrate"] / 100
    ours = task["metrics"][LC]["value"]
    assert abs(ours - whole) < 0.02
    assert ours != pytest.approx(shifted, abs=1e-4)
    assert [s["doc_id"] for s in samples] == [i for i in range(N) if i != 5]


def test_repeated_and_unknown_rows_are_counted_and_named_and_change_nothing(data):
    rows = annotations(N)
    more = [*rows, {**rows[7], "preference": 1}, {**rows[0], "instruction": "Who?"}]
    (task, samples), (expected, same) = (score_stored(x, data, offline=True) for x in (more, rows))
    assert (task["metrics"], samples) == (expected["metrics"], same)
    unknown, again = task["notes"]
    assert re.match("1 rows are about no instruction of AlpacaEval.*: 'Who\\?'", unknown)
    assert re.match("1 rows repeat an instruction.*: 'Question 7:", again)


def test_blanks_around_an_instruction_do_not_matter(data):
    rows = [{**r, "instruction": f"\n {r['instruction']} "} for r in annotations(N)]
    expected = score_stored(annotations(N), data, offline=True)
    assert score_stored(rows, data, offline=True) == expected


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"preference": 2}], "row 1 has no text under `instruction`"),
        ([{"instruction": "Who?", "preference": 2}], "none of 1 row.*'Who\\?'"),
        (
            [{**r, "preference": None} for r in annotations(3)],
            "none of 3 pair.*has a preference",
        ),
        ([{**annotations(1)[0], "preference": "M"}], "preference 'M' is no number"),
        ([{**annotations(1)[0], "output_2": 7}], "output_2 7 is no text"),
        (
            [{**r, "generator_2": str(i)} for i, r in enumerate(annotations(2))],
            r"generator_2 is 2 different names \(0, 1\)",
        ),
        (
            [{**r, "annotator": str(i)} for i, r in enumerate(annotations(2))],
            "annotator is 2 different names",
        ),
    ],
)
def test_rows_that_give_no_figure_are_errors(rows, message, data):
    with pytest.raises(DataError, match=message):
        score_stored(rows, data, offline=True)


# --- where there is no length control ------------------------------------------------------------


def reason(task: dict) -> str:
    assert LC not in task["metrics"]
    (note,) = [n for n in task["notes"] if n.startswith("no length-controlled win rate: ")]
    return note


def test_another_judge_s_figure_has_its_name_and_no_length_control(data):
    rows = [{**r, "annotator": "qwen"} for r in annotations(N)]
    task, samples = score_stored(rows, data, offline=True)
    assert list(task["metrics"]) == [f"{WIN}@qwen"] == [task["headline"]]
    assert list(samples[0]["scores"]) == [f"{WIN}@qwen"]
    expected = get_winrate(rows)["win_rate"] / 100
    assert task["metrics"][f"{WIN}@qwen"]["value"] == pytest.approx(expected)
    assert "these are qwen's" in reason(task)


def test_a_file_that_names_no_judge_says_so(data):
    rows = [{k: v for k, v in r.items() if k != "annotator"} for r in annotations(N)]
    task, _ = score_stored(rows, data, offline=True)
    assert task["headline"] == LC
    assert task["notes"] == ["no row names its judge: taken to be weighted_alpaca_eval_gpt4_turbo"]


def test_without_references_or_difficulty_there_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    task, samples = score_stored(annotations(N), tmp_path, offline=True)
    assert "without AlpacaEval's reference outputs" in reason(task)
    assert any("--data-dir DIR" in note for note in task["notes"])
    assert (task["headline"], task["data_sha256"], len(samples)) == (WIN, None, N)

    bare = data_dir(tmp_path / "bare", N, gamed=False)
    task, _ = score_stored(annotations(N), bare, offline=True)
    assert "df_gamed.csv is neither in" in reason(task)


def test_length_control_that_alpaca_eval_wrote_into_the_file_is_used_where_it_cannot_be_fitted(
    data, tmp_path, monkeypatch
):
    frame = pd.DataFrame(annotations(N))
    found = plainly(frame, data, monkeypatch)  # writes glm_preference
    bare = data_dir(tmp_path, N, gamed=False)
    for place in (bare, tmp_path / "none"):
        task, _ = score_stored(frame.to_dict("records"), place, offline=True)
        require_same(task, found)
        assert task["notes"][0].startswith("length control as alpaca-eval wrote it into the file")
    some = frame.assign(glm_preference=frame["glm_preference"].where(frame.index != 3))
    reason(score_stored(some.to_dict("records"), bare, offline=True)[0])
    # Where it can be fitted, it is.
    wrong = frame.assign(glm_preference=0.9).to_dict("records")
    require_same(score_stored(wrong, data, offline=True)[0], found)


def test_a_suspicious_length_control_is_named_so(data):
    """Long responses always win: of equal length they would not."""
    rows = annotations(N)
    for i, row in enumerate(rows):
        long = len(row["output_2"]) > len(row["output_1"]) or i % 2
        row["preference"] = 1.99 if long else 1.4
        row["output_2"] = row["output_1"] + "z" * (600 if long else 5) + "z" * i
    task, _ = score_stored(rows, data, offline=True)
    (note,) = task["notes"]
    assert note.startswith("the length control moves the win rate from")


def test_another_baseline_has_no_length_control(data):
    rows = [{**r, "output_1": "hm " + r["output_1"]} for r in annotations(N)]
    assert "output_1 holds others" in reason(score_stored(rows, data, offline=True)[0])


def test_a_damaged_table_of_difficulty_is_not_used(tmp_path):
    data = data_dir(tmp_path, N)
    path = data / "alpaca_eval" / "df_gamed.csv"
    head, *lines = path.read_text().splitlines()
    path.write_text("\n".join([head, *lines[1:], lines[0]]))
    task, _ = score_stored(annotations(N), data, offline=True)
    assert "does not hold every instruction's difficulty in order" in reason(task)
    path.write_text("what,ever\n1,2\n")
    assert "index" in reason(score_stored(annotations(N), data, offline=True)[0])


def test_lengths_that_do_not_vary_have_no_length_control(data):
    rows = [{**r, "output_2": "x" * len(r["output_1"])} for r in annotations(N)]
    assert "by the same amount" in reason(score_stored(rows, data, offline=True)[0])


# --- surroundings --------------------------------------------------------------------------------


def test_nothing_of_alpaca_eval_or_scikit_learn_is_changed(data):
    package = Path(glm_winrate.__file__).parents[1]
    before = {p for p in package.rglob("*") if "__pycache__" not in p.parts}
    download = glm_winrate.hf_hub_download
    with sklearn.config_context(enable_metadata_routing=False):
        score_stored(annotations(N), data, offline=True)
        assert not sklearn.get_config()["enable_metadata_routing"]
    assert {p for p in package.rglob("*") if "__pycache__" not in p.parts} == before
    assert glm_winrate.hf_hub_download is download


def test_a_missing_package_is_named_with_its_cure(monkeypatch, data):
    monkeypatch.setitem(sys.modules, "alpaca_eval.metrics.glm_winrate", None)
    with pytest.raises(ConfigError, match=r"pip install 'srppo\[eval\]'"):
        score_stored(annotations(N), data, offline=True)


def test_a_damaged_file_of_references_is_an_error(tmp_path):
    (tmp_path / "alpaca_eval_gpt4_baseline.json").write_text('[{"instruction": 1}]')
    with pytest.raises(DataError, match="no list of objects with instruction and output"):
        load_references(tmp_path, offline=True)


def test_a_limit_asks_for_the_first_ones_only(data):
    few = load_references(data, offline=True).first(10)
    task, samples = score_annotations(annotations(N), few, data, offline=True)
    assert (len(few), task["n"], [s["doc_id"] for s in samples]) == (10, 10, list(range(10)))
    assert not any("have no row" in note for note in task["notes"])


def test_the_real_references_are_read():
    data = Path(__file__).resolve().parents[3] / "shared" / "data"
    if not (data / "alpaca_eval").is_dir():
        pytest.skip("needs AlpacaEval's references in the folder `shared` beside the repository")
    found = load_references(data, offline=True)
    assert (len(found), len(found.places)) == (805, 805)
    assert (
        references(1)[0].keys() >= {"instruction", "output", "generator"} <= found.outputs[0].keys()
    )
