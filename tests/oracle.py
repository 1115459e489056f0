"""The real trainer on the enumerable problem, once for each seed.

    PYTHONPATH=tests python tests/oracle.py [VARIANT ...] [--seeds 0 1 2] [--kl-coefs 0.2 0.5]

Prints for each how much of the gap from J(pi_sft) to J* was closed, and KL(pi_theta||pi*).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from enumerable import EOS, LENGTH, PROMPTS, Exact, exact, fine_tuned, tiny_llama
from srppo.config import PPOConfig
from srppo.models.roles import Roles
from srppo.progress import Reporter
from srppo.rollout.hf import HFSampler
from srppo.train.metrics import MetricsLog
from srppo.train.ppo import train_ppo

SAFE = {"update_kl_limit": 0.01}
"""Without, PPO and RLOO lose a response of the optimum for good in some seeds (docs/LOG.md)."""
CRITIC = {**SAFE, "value_learning_rate": 3e-3}
VARIANTS = {
    "all-action": {"estimator": "all_action"},
    "ppo-eos": {**CRITIC, "credit": "eos"},
    "ppo-token": {**CRITIC, "credit": "token", "gae_lambda": 0.95},
    "rloo": {**SAFE, "estimator": "rloo", "responses_per_prompt": 8},
}


def reach(variant: str, kl_coef: float, seed: int) -> Exact:
    """What 100 steps of 512 rollouts come to."""
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
    quiet = Reporter(quiet=True)
    with tempfile.TemporaryDirectory() as folder, MetricsLog(Path(folder), "ppo") as log:
        train_ppo(roles, sampler, PROMPTS, config, seed=seed, log=log, reporter=quiet)
    return exact(roles.policy, sft, base, kl_coef)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("variants", nargs="*", choices=[*VARIANTS, []], default=[])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4, 5, 6, 7])
    parser.add_argument("--kl-coefs", nargs="+", type=float, default=[0.2, 0.5])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for kl_coef in arguments.kl_coefs:
        for variant in arguments.variants or VARIANTS:
            found = [reach(variant, kl_coef, seed) for seed in arguments.seeds]
            gaps = " ".join(f"{x.gap_closed:.4f}" for x in found)
            kls = " ".join(f"{x.kl_to_optimum:.4f}" for x in found)
            print(f"{variant}, kl_coef {kl_coef}: gap closed {gaps}; KL {kls}", flush=True)


if __name__ == "__main__":
    main()
