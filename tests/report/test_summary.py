"""Means and intervals over seeds, against scipy."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from srppo.errors import ConfigError, RunDirError
from srppo.report.summary import Interval, summarise

ACCURACY = {  # model -> one value a seed
    "base": [0.10, 0.12, 0.08, 0.12],
    "sft": [0.50, 0.55, 0.41, 0.52],
    "policy": [0.82, 0.83, 0.75, 0.80],
}


def write(path, accuracy, groups=("in", "out"), scores=True, decodings=("T=1",)):
    """A run directory with the scores of one seed."""
    rows = [
        {
            "model": model,
            "decoding": decoding,
            "group": group,
            "n": 10,
            "scores": {"accuracy": value - 0.05 * k} if scores else {},
            "response_length": 4.0 + 2 * k,
            "eos_rate": 0.9,
            "reward": value * 10,
        }
        for model, value in accuracy.items()
        for decoding in decodings
        for k, group in enumerate(groups)
    ]
    path.mkdir()
    (path / "results.json").write_text(json.dumps({"groups": list(groups), "rows": rows}))
    return path


@pytest.fixture
def runs(tmp_path):
    return [
        write(tmp_path / f"seed-{seed}", {m: v[seed] for m, v in ACCURACY.items()})
        for seed in range(4)
    ]


def tables(text):
    """The two Markdown tables as lists of dictionaries."""
    found, header = [], None
    for line in text.splitlines():
        if not line.startswith("| "):
            header = None
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if header is None:
            header = cells
            found.append([])
        elif set(cells[0]) != {"-"}:
            found[-1].append(dict(zip(header, cells, strict=True)))
    return found


def scipys(values):
    """Mean and half-width by another road than ours."""
    low, high = stats.t.interval(
        0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values)
    )
    return np.mean(values), (high - low) / 2


@pytest.mark.parametrize("values", [[1.0, 2.0], ACCURACY["sft"], [0.5] * 3, [-1e6, 1e6, 3.0]])
def test_intervals_are_students(values):
    interval = Interval.of(values)
    mean, half = scipys(values) if len(set(values)) > 1 else (values[0], 0.0)
    assert interval.mean == pytest.approx(mean)
    assert interval.half == pytest.approx(half)


def test_one_run_gives_a_mean_and_no_interval():
    interval = Interval.of([0.5])
    assert interval.mean == 0.5
    assert math.isnan(interval.half)
    assert str(interval) == "0.500"


def test_each_cell_is_mean_and_interval_over_the_runs(runs):
    first, _ = tables(summarise(runs))
    assert [row["model"] for row in first] == ["base", "sft", "policy"]
    for row in first:
        mean, half = scipys(ACCURACY[row["model"]])
        assert row["accuracy in"] == f"{mean:.3f}±{half:.3f}"
        assert row["accuracy out"] == f"{mean - 0.05:.3f}±{half:.3f}"
        assert row["length"] == "5.000±0.000"  # mean of 4 and 6
        assert row["EOS"] == "0.900±0.000"


def test_differences_are_paired_by_run(runs):
    """Seed 2 was hard for every model: the paired interval is far narrower than the unpaired."""
    _, second = tables(summarise(runs))
    assert [row["model"] for row in second] == ["base", "sft"]
    for row in second:
        pairs = zip(ACCURACY["policy"], ACCURACY[row["model"]], strict=True)
        mean, half = scipys([a - b for a, b in pairs])
        assert half < 0.07
        assert row["accuracy in"] == f"{mean:.3f}±{half:.3f}*"
        assert "length" not in row


def test_a_difference_that_may_be_zero_has_no_star(tmp_path):
    noisy = {"sft": [0.1, 0.9, 0.5], "policy": [0.9, 0.1, 0.6]}
    runs = [
        write(tmp_path / str(seed), {m: v[seed] for m, v in noisy.items()}) for seed in range(3)
    ]
    (row,) = tables(summarise(runs))[1]
    assert "±" in row["accuracy in"]
    assert "*" not in row["accuracy in"]


def test_a_single_run_shows_its_numbers_without_intervals_and_stars(runs):
    text = summarise(runs[:1])
    assert text.startswith("1 runs")
    (*_, policy), differences = tables(text)
    assert policy["accuracy in"] == "0.820"
    assert differences[1]["accuracy in"] == "0.320"
    assert "±0" not in text
    assert "nan" not in text


def test_models_are_compared_at_the_same_decoding_only(tmp_path):
    values = {"sft": 0.2, "policy": 0.6}
    run = write(tmp_path / "run", values, decodings=("greedy", "T=1"))
    _, differences = tables(summarise([run]))
    assert [(row["model"], row["decoding"]) for row in differences] == [
        ("sft", "greedy"),
        ("sft", "T=1"),
    ]


def test_without_scores_the_reward_is_shown(tmp_path):
    run = write(tmp_path / "run", {"sft": 0.2, "policy": 0.6}, scores=False)
    first, _ = tables(summarise([run]))
    assert [row["reward in"] for row in first] == ["2.000", "6.000"]


@pytest.mark.parametrize(
    "other",
    [
        {"accuracy": {"base": 0.1, "sft": 0.2}},
        {"accuracy": {"base": 0.1, "sft": 0.2, "policy": 0.3, "rloo": 0.3}},
        {"groups": ("in",)},
        {"groups": ("in", "elsewhere")},
        {"scores": False},
        {"decodings": ("greedy",)},
    ],
    ids=["fewer models", "more models", "fewer groups", "other groups", "other scores", "decoding"],
)
def test_runs_that_measured_other_things_cannot_be_averaged(runs, tmp_path, other):
    settings = {"accuracy": {m: v[0] for m, v in ACCURACY.items()}, **other}
    odd = write(tmp_path / "odd", **settings)
    with pytest.raises(ConfigError, match="did not measure the same") as error:
        summarise([*runs, odd])
    assert str(odd) in str(error.value)
    assert "one recipe" in str(error.value)


def test_a_run_without_results_is_named(runs, tmp_path):
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"unfinished holds no results.*srppo run"):
        summarise([*runs, unfinished])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"reward": None, "scores": {}}, "reward is None"),
        ({"scores": {"accuracy": "high"}}, "accuracy is 'high'"),
        ({"eos_rate": None}, "eos_rate is None"),
        ({"scores": 3}, "TypeError"),
    ],
)
def test_results_that_are_not_whole_are_named(runs, damage, words):
    path = runs[1] / "results.json"
    results = json.loads(path.read_text())
    results["rows"][1] |= damage
    path.write_text(json.dumps(results))
    with pytest.raises(ConfigError, match=rf"results\.json is not whole.*{words}.*srppo run"):
        summarise(runs)
    for key in ("model", "decoding", "group", "scores", "response_length"):
        results["rows"][1] = {k: v for k, v in results["rows"][0].items() if k != key}
        path.write_text(json.dumps(results))
        with pytest.raises(ConfigError, match=rf"results\.json is not whole.*KeyError: '{key}'"):
            summarise(runs)
    path.write_text('{"rows": [1]}')
    with pytest.raises(ConfigError, match=r"results\.json is not whole"):
        summarise(runs)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model": {"base": "b", "dtype": "bfloat16"}}, "model.dtype"),
        ({"model": {"base": "b", "dtype": "float32", "lora": {"rank": 4}}}, "model.lora"),
        ({"ppo": {}}, "ppo"),
    ],
)
def test_only_which_models_they_are_may_differ(runs, changes, key):
    recipe = {"name": "a", "seed": 0, "model": {"base": "a", "sft": "c", "dtype": "float32"}}
    other = {"name": "b", "seed": 1, "model": {"base": "b", "sft": "d", "dtype": "float32"}}
    for path, settings in zip(runs[:2], (recipe, other), strict=True):
        (path / "run.json").write_text(json.dumps({"recipe": settings}))
    assert summarise(runs[:2])
    for first, second in ((0, 1), (1, 0)):
        (runs[first] / "run.json").write_text(json.dumps({"recipe": recipe}))
        (runs[second] / "run.json").write_text(json.dumps({"recipe": other | changes}))
        with pytest.raises(ConfigError, match=f"differ in '{key}'"):
            summarise(runs[:2])


def test_no_run_at_all_is_named(tmp_path):
    with pytest.raises(RunDirError, match="nowhere"):
        summarise([tmp_path / "nowhere"])


def test_a_run_counted_twice_or_of_another_recipe_is_refused(runs):
    for seed, path in enumerate(runs):
        recipe = {"seed": seed, "output_dir": str(path), "ppo": {"kl_coef": 0.2}}
        (path / "run.json").write_text(json.dumps({"recipe": recipe}))
    summarise(runs)
    with pytest.raises(ConfigError, match="seed 1 is there more than once"):
        summarise([runs[0], runs[1], runs[1]])
    recipe = {"seed": 9, "output_dir": "x", "ppo": {"kl_coef": 0.5}}
    (runs[2] / "run.json").write_text(json.dumps({"recipe": recipe}))
    with pytest.raises(ConfigError, match="differ in 'ppo'"):
        summarise(runs)


def test_a_run_that_was_changed_on_its_way_is_named(runs):
    assert "changed on the way" not in summarise(runs)
    changed = ["seed was 0 and is now 1", "torch was 2.9 and is now 2.10"]
    record = {"changes": [{"at": "2026-01-12", "changed": changed}]}
    (runs[2] / "run.json").write_text(json.dumps(record))
    line = summarise(runs).splitlines()[-1]
    assert line == f"- {runs[2]}: changed on the way, 2026-01-12: {'; '.join(changed)}"
