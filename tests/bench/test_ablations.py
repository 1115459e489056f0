"""The table of an ablation study: on values made up so that the differences are known."""

from __future__ import annotations

from ablations import table

SEEDS = ("0", "1", "2")


def cell(*points: float) -> dict[str, float]:
    return dict(zip(SEEDS, points, strict=True))


def test_differences_are_of_the_same_seed_and_starred_where_sure():
    values = {
        ("recipe", "sft", "T=1", "all"): cell(10, 20, 30),
        ("recipe", "policy", "T=1", "all"): cell(60, 70, 80),
        ("other", "sft", "T=1", "all"): cell(50, 50, 50),
        ("other", "policy", "T=1", "all"): cell(40, 51, 60),
    }
    assert table(values, "T=1", "other").splitlines()[2:] == [
        "| recipe | 3 | 20 | +50 ± 0* | +0 ± 0 | +20 ± 25 |",
        "| other | 3 | 50 | +0 ± 25 | -20 ± 1* | +0 ± 25 |",
    ]
