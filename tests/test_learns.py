"""The oracle of the whole method: the real trainer against the enumerated optimum.

J* and pi* come from `enumerable`, which shares nothing with the trainer but the models.
"""

from __future__ import annotations

import pytest

from enumerable import EOS, LENGTH, PROMPTS, exact, fine_tuned, tiny_llama
from srppo.config import PPOConfig
from srppo.models.roles import Roles
from srppo.progress import Reporter
from srppo.rollout.hf import HFSampler
from srppo.train.metrics import MetricsLog
from srppo.train.ppo import train_ppo

VARIANTS = {
    "all-action": {"estimator": "all_action"},
    "ppo-eos": {"credit": "eos"},
    "ppo-token": {"credit": "token", "value_learning_rate": 1.5e-3},  # see docs/LOG.md
    "rloo": {"estimator": "rloo", "responses_per_prompt": 8},
}
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
def test_the_trainer_reaches_the_enumerated_optimum(variant, kl_coef, tmp_path, capsys):
    """100 steps of 512 rollouts close 99% of the gap from J(sft) to J*."""
    base = tiny_llama(seed=0)
    sft = fine_tuned(base, seed=0)
    config = PPOConfig(
        steps=100,
        rollouts_per_step=512,
        epochs=4,
        minibatch_size=256,
        learning_rate=1.5e-3,
        lr_schedule="cosine",
        kl_coef=kl_coef,
        max_kl=1e9,
        **VARIANTS[variant],
    )
    roles = Roles.begin(base, sft, critic=config.estimator == "ppo")
    sampler = HFSampler(roles.policy, eos_token_id=EOS, max_new_tokens=LENGTH, critic=roles.critic)
    with MetricsLog(tmp_path, "ppo") as log:
        train_ppo(
            roles, sampler, PROMPTS, config, seed=0, log=log, reporter=Reporter(quiet=True)
        )  # fmt: skip

    found = exact(roles.policy, sft, base, kl_coef)
    with capsys.disabled():
        print(
            f"\n{variant} kl_coef={kl_coef}: gap closed {found.gap_closed:.4f}, "
            f"KL(policy||optimum) {found.kl_to_optimum:.4f} nats, J {found.j_sft:.3f} -> "
            f"{found.j_policy:.3f} of {found.j_star:.3f}"
        )
    assert found.j_policy <= found.j_star + 1e-4
    assert found.gap_closed >= 0.99
    assert found.kl_to_optimum <= 0.03


def test_the_gap_at_the_start_is_the_gibbs_identity():
    """J* - J(sft) = kl_coef KL(sft || pi*): reward, KL, EOS mask and truncation all at once."""
    base = tiny_llama(seed=3)
    sft = fine_tuned(base, seed=3)
    for kl_coef in (0.2, 0.5, 1.0):
        at_sft = exact(sft, sft, base, kl_coef)
        gap = at_sft.j_star - at_sft.j_sft
        assert gap == pytest.approx(kl_coef * at_sft.kl_to_optimum, abs=1e-6)
        assert at_sft.kl_to_optimum > 0.5
