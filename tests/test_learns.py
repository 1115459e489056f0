"""The oracle of the whole method: the real trainer against the enumerated optimum.

J* and pi* come from `enumerable`, which shares nothing with the trainer but the models.
"""

from __future__ import annotations

import pytest

from enumerable import exact, fine_tuned, tiny_llama
from oracle import reach

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("variant", "kl_coef"),
    [
        ("rloo", 0.5),  # one of them in every `make test`
        pytest.param("rloo", 0.2, marks=SLOW),
        pytest.param("all-action", 0.5, marks=SLOW),
        pytest.param("all-action", 0.2, marks=SLOW),
        pytest.param("ppo-eos", 0.5, marks=SLOW),
        pytest.param("ppo-eos", 0.2, marks=SLOW),
        pytest.param("ppo-token", 0.5, marks=SLOW),
        pytest.param("ppo-token", 0.2, marks=SLOW),
    ],
)
def test_the_trainer_reaches_the_enumerated_optimum(variant, kl_coef, capsys):
    """100 steps of 512 rollouts close 99% of the gap from J(sft) to J*.

    What is left of KL to the optimum is 0.03 nats. At beta 0.2, where the optimum is six times as
    far away, an estimator that learns from samples alone may miss a response of a few per cent,
    which adds 0.03 to 0.08: in which seeds depends on how the machine rounds (docs/LOG.md).
    """
    found = reach(variant, kl_coef, seed=0)
    with capsys.disabled():
        print(
            f"\n{variant} kl_coef={kl_coef}: gap closed {found.gap_closed:.4f}, "
            f"KL(policy||optimum) {found.kl_to_optimum:.4f} nats, J {found.j_sft:.3f} -> "
            f"{found.j_policy:.3f} of {found.j_star:.3f}"
        )
    assert found.j_policy <= found.j_star + 1e-4
    assert found.gap_closed >= 0.99
    may_miss_one = variant != "all-action" and kl_coef == 0.2
    assert found.kl_to_optimum <= (0.15 if may_miss_one else 0.03)


def test_the_gap_at_the_start_is_the_gibbs_identity():
    """J* - J(sft) = kl_coef KL(sft || pi*): reward, KL, EOS mask and truncation all at once."""
    base = tiny_llama(seed=3)
    sft = fine_tuned(base, seed=3)
    for kl_coef in (0.2, 0.5, 1.0):
        at_sft = exact(sft, sft, base, kl_coef)
        gap = at_sft.j_star - at_sft.j_sft
        assert gap == pytest.approx(kl_coef * at_sft.kl_to_optimum, abs=1e-6)
        assert at_sft.kl_to_optimum > 0.5
