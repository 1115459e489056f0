"""Against numbers worked out by hand."""

from __future__ import annotations

import pytest

from table import summary, table


def line(engine: str, *seconds: float, ends: str = "early", **more) -> dict:
    measured = {"cpu_seconds": list(seconds), "mean_length": 50.0, "peak_mb": 400.0}
    return {"size": "9m", "ends": ends, "engine": engine} | measured | more


LINES = [
    line("trl-ppo", 30.0, peak_mb=8000.0),
    line("ours-ppo", 4.0, 7.0, gflop_needed=[80.0, 70.0], attainable_gflops=100.0),
    line("ours-ppo", 999.0, ends="full"),
    line("trl-ppo", 34.0, peak_mb=7000.0),
    line("ours-ppo", 5.0, 16.0, peak_mb=500.0, gflop_needed=[50.0, 32.0], attainable_gflops=50.0),
]


def test_medians_over_rounds_and_steps_of_one_case():
    trl, ours = summary(LINES, "9m", "early")
    assert (trl.engine, trl.cpu_seconds, trl.peak_mb) == ("trl-ppo", 32.0, 8000.0)
    assert (ours.cpu_seconds, ours.fastest, ours.slowest, ours.peak_mb) == (6.0, 4.0, 16.0, 500.0)
    assert trl.responses_per_second == 64 / 32
    assert ours.tokens_per_second == pytest.approx(50 * 64 / 6)


def test_the_share_of_the_attainable_is_taken_step_by_step():
    """Shares 0.2, 0.1, 0.2 and 0.04: the median is 0.15."""
    assert summary(LINES, "9m", "early")[1].share == pytest.approx(0.15)


def test_ratios_are_of_responses_a_second_and_of_peaks():
    printed = table(summary(LINES, "9m", "early"), "9m", "early")
    cells = [c.strip() for c in printed.split("| ours-ppo")[1].splitlines()[0].split("|")[1:-1]]
    assert cells[3] == f"{32 / 6:.2f}"
    assert cells[4] == ""  # there is no TRL RLOO to compare with
    assert cells[8] == f"{500 / 8000:.2f}"


def test_phases_are_shares_over_all_rounds():
    phases = [{"rollout": [1.0, 2.0], "update": [3.0]}, {"rollout": [1.0], "update": [1.0]}]
    (row,) = summary([line("x", 1.0, phases=p) for p in phases], "9m", "early")
    assert row.phases == {"rollout": 0.5, "update": 0.5}
