"""The study of the λ-curve: on runs made up so that the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from lambda_curve import DRAWS, Run, auto, correlation, failures
from srppo.miniature.world import GROUPS


def run(variant: str, seed: int, rise: float, gain: float, **found: float) -> Run:
    """NLL 1 at λ = 1 and `rise` more at 6 and 3; SFT is right in half of all cases, the policies
    in `gain` more; `found` of other models."""
    shares = {"sft": 0.5, "policy": 0.5 + gain, "beta-0.5": 0.5 + gain / 2, **found}
    return Run(
        variant,
        seed,
        lam_star=1.0 if rise > 0 else 6.0,
        warned=False,
        curves={name: {1.0: 1.0, 3.0: 1 + rise, 6.0: 1 + rise} for name in ("held_out", *GROUPS)},
        accuracy={
            (m, d, g): v for m, v in shares.items() for d in ("T=1", "greedy") for g in GROUPS
        },
    )


def test_rho_is_scipys_and_the_interval_holds_it():
    rng = np.random.default_rng(1)
    points = [(str(v), s, *rng.normal(size=2)) for v in range(12) for s in range(3)]
    runs = [run(v, s, x, 0.1 * (y - x)) for v, s, x, y in points]
    rho, low, high = correlation(
        runs, lambda r: r.rise(6.0), lambda r: r.gain("policy", "T=1", GROUPS[0])
    )
    expected = spearmanr([p[2] for p in points], [p[3] - p[2] for p in points]).statistic
    assert rho == pytest.approx(expected)
    assert low < rho < high < 0


def test_seeds_of_one_variant_do_not_count_as_independent():
    """Ten copies of each of six points: the interval is that of six points, not of sixty."""
    six = [(-2, 0.1), (-1, 0.3), (0.5, 0.2), (1, -0.1), (2, 0.05), (3, -0.3)]
    once = [run(str(i), 0, x, y) for i, (x, y) in enumerate(six)]
    often = [run(str(i), s, x, y) for i, (x, y) in enumerate(six) for s in range(10)]

    def found(runs: list[Run]) -> tuple[float, float, float]:
        return correlation(
            runs, lambda r: r.rise(6.0), lambda r: r.gain("policy", "T=1", GROUPS[0])
        )

    assert DRAWS >= 1000
    assert found(often) == pytest.approx(found(once))


def test_wrong_signs_are_named():
    runs = {
        "right": [run("right", 0, -1.0, 0.2), run("right", 1, -1.0, 0.3)],
        "harmful": [run("harmful", 0, -1.0, -0.2), run("harmful", 1, -1.0, -0.2)],
        "warned": [run("warned", 0, 1.0, 0.1), run("warned", 1, 1.0, -0.4)],
    }
    (first, *_) = failures(runs).splitlines()
    assert "2 of 3 signs right" in first
    assert "Beyond the interval: harmful -0.200±0.000." in first
    assert "warned" not in first


def test_auto_without_a_beta_is_the_sft_model():
    kept = [run("kept", s, 1.0, -0.3) for s in (0, 1)]
    worse = [run("worse", s, -1.0, 0.3, auto=0.4) for s in (0, 1)]
    assert kept[0].gain("auto", "T=1", GROUPS[0]) == 0
    said = auto({"kept": kept, "worse": worse})
    assert "In 2 of 4 runs" in said
    assert said.count("Beyond the interval: worse -0.100±0.000.") == 6
    assert "kept -" not in said
