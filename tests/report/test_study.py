"""A study's table: scipy's intervals, gains paired by seed, the same in every form."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from srppo.report.study import Result, write_study

SFT = [0.1, 0.2, 0.6]
POLICY = [0.3, 0.5, 0.9]
SOMETIMES = {0: 0.2, 2: 0.5}
"""Of a control that one seed lacks."""


def row(model: str, group: str, value: float, decoding: str = "T=1") -> dict:
    return {
        "model": model, "decoding": decoding, "group": group, "n": 10,
        "scores": {"accuracy": value, "format": 1.0}, "response_length": 4.0, "eos_rate": 1.0,
        "reward": 0.0,
    }  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> list[Result]:
    found = []
    for variant in ("a", "b"):
        for seed in range(3):
            rows = [
                row(m, g, v[seed])
                for m, v in (("sft", SFT), ("policy", POLICY))
                for g in ("in", "out")
            ]
            rows += [row("auto", g, SOMETIMES[seed]) for g in ("in", "out") if seed in SOMETIMES]
            path = tmp_path / f"{variant}{seed}"
            path.mkdir()
            (path / "results.json").write_text(json.dumps({"groups": ["in", "out"], "rows": rows}))
            found.append(Result(variant, seed, path))
    return found


def half(values: list[float]) -> float:
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    return (high - low) / 2


def test_means_intervals_and_gains_are_scipys(results, tmp_path):
    text = write_study("small", results, tmp_path)
    gains = [p - s for p, s in zip(POLICY, SFT, strict=True)]
    policy = f"{np.mean(POLICY):.3f}±{half(POLICY):.3f} (+{np.mean(gains):.3f}±{half(gains):.3f}*)"
    assert f"| a | policy | T=1 | 3 | {policy} | {policy} |" in text
    sft = f"{np.mean(SFT):.3f}±{half(SFT):.3f}"
    assert f"| b | sft | T=1 | 3 | {sft} | {sft} |" in text
    assert (tmp_path / "table.md").read_text() == text


def test_a_model_that_some_seeds_lack_is_paired_with_those_it_has(results, tmp_path):
    write_study("small", results, tmp_path)
    lines = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    (line,) = [
        x
        for x in lines
        if (x["variant"], x["model"], x["group"], x["score"]) == ("a", "auto", "in", "accuracy")
    ]
    gains = [SOMETIMES[0] - SFT[0], SOMETIMES[2] - SFT[2]]
    assert line["n"] == "2"
    assert float(line["mean"]) == pytest.approx(0.35)
    assert float(line["gain"]) == pytest.approx(np.mean(gains))
    assert float(line["gain_half"]) == pytest.approx(half(gains))


def test_the_json_holds_every_value_by_seed(results, tmp_path):
    write_study("small", results, tmp_path)
    cells = json.loads((tmp_path / "table.json").read_text())["cells"]
    found = {(c["variant"], c["model"], c["group"], c["score"]): c["values"] for c in cells}
    assert found["b", "policy", "out", "accuracy"] == {"0": 0.3, "1": 0.5, "2": 0.9}
    assert found["a", "auto", "in", "accuracy"] == {"0": 0.2, "2": 0.5}
    assert found["a", "sft", "in", "eos_rate"] == {"0": 1.0, "1": 1.0, "2": 1.0}


def test_one_seed_has_no_interval_and_no_star(results, tmp_path):
    text = write_study("small", results[:1], tmp_path)
    assert "| a | policy | T=1 | 1 | 0.300 (+0.200) |" in text
    (line, *_) = csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text()))
    assert math.isnan(float(line["half"]))


def test_same_runs_same_bytes(results, tmp_path):
    write_study("small", results, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.glob("table.*")}
    write_study("small", results, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.glob("table.*")} == before
    assert set(before) == {"table.md", "table.csv", "table.json", "table.svg"}
    assert b"<svg" in before["table.svg"]
    assert b"a / policy" in before["table.svg"]
