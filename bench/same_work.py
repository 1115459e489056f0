"""Do the engines that the benchmark compares compute the same? On the peers' own rollouts.

    .venv/bin/python bench/same_work.py [--peers rloo grpo] [--out runs/bench/same_work]

Each peer runs one step of two epochs; what it computed is captured (capture.py) and computed again
by our functions from nothing but its tokens and weights. Exits with 1 if a line is off by more
than its tolerance. bench/README.md lists what differs by convention.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

from case import SIZES
from ours import replay, settings_of
from run import PEER, build, start
from srppo.algo.advantage import gae, leave_one_out
from srppo.algo.kl import k1, k3
from srppo.algo.loss import clipped_policy_loss, clipped_value_loss
from srppo.algo.masking import masked_mean, masked_sum, whiten
from srppo.algo.reward import token_log_ratios, token_rewards
from srppo.models.batching import Sequences
from srppo.rollout.sampler import Rollout
from workload import EOS

PEERS = ["ppo", "rloo", "grpo"]
"""PPO needs TRL 1.12's environment."""
KL_COEF, CLIP = 0.2, 0.2
ONCE = {"learning_rate": 3e-4, "max_grad_norm": 1e9, "kl_coef": KL_COEF, "gae_lambda": 1.0}
TWICE = ONCE | {"epochs": 2}


class Comparison:
    """Lines of what was compared, and how far it is off."""

    def __init__(self) -> None:
        self.failed = False

    def __call__(self, what: str, ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
        """Absolute, for nats and losses; relative for what is larger than 1."""
        ours, theirs = (torch.as_tensor(x, dtype=torch.float64) for x in (ours, theirs))
        assert ours.shape == theirs.shape, (what, ours.shape, theirs.shape)
        error = float(((ours - theirs).abs() / theirs.abs().clamp(min=1.0)).max())
        wrong = not error <= tolerance
        self.failed |= wrong
        verdict = "DIFFERS" if wrong else "same"
        print(f"{verdict:8}{what:68} {error:.0e}, allowed {tolerance:.0e}; {theirs.numel()} values")


def rollout_of(prompts: list[list[int]], responses: list[list[int]]) -> Rollout:
    """A peer's responses as ours."""
    y = Sequences.of(prompts, responses)
    ended = torch.tensor([r[-1] == EOS for r in responses])
    return Rollout(y, torch.zeros(y.mask.shape), ended)


def compare_ppo(directory: Path, found: dict[str, Any], same: Comparison, critic: str) -> None:
    """Against PPOTrainer; with a critic that starts at zero, the whole step, too."""
    lengths = (found["sequence_lengths"] + 1).tolist()
    responses = [r[:n] for r, n in zip(found["responses"].tolist(), lengths, strict=True)]
    rollout = rollout_of(found["queries"].tolist(), responses)
    mask, weights = rollout.sequences.mask, found["weights"]["policy"]
    T = mask.shape[1]
    logprobs, ref, values, returns, advantages = (
        torch.where(mask, found[name][:, :T], 0.0)
        for name in ("logprobs", "ref_logprobs", "values", "returns", "advantages")
    )
    config = settings_of(directory, 1, "ppo", TWICE)
    metrics, scores, _ = replay(directory, weights[0], rollout, config)

    name = f"PPO, {critic}:"
    same(f"{name} log-probabilities of the policy", scores.policy, logprobs)
    same(f"{name} log-probabilities of the reference", scores.sft, ref)
    ratios = token_log_ratios(scores.sft, scores.base, mask)
    same(f"{name} reward of each response", masked_sum(ratios, mask, 1), found["scores"])
    kl = torch.where(mask, k1(scores.policy, scores.sft), 0.0)
    same(f"{name} KL of each token", kl, torch.where(mask, found["kl"][:, :T], 0.0))
    rewards = token_rewards(ratios, scores.policy, scores.sft, mask, KL_COEF, "eos")
    same(f"{name} reward with KL penalty, summed", rewards.sum(1), found["rewards"].sum(1))
    ours, our_returns = gae(rewards, values, mask, 1.0, 1.0)
    same(f"{name} returns", our_returns, returns)
    n = int(mask.sum())
    bessel = math.sqrt((n - 1) / n)  # TRL divides the variance by n - 1
    ours = whiten(ours, mask) * bessel
    same(f"{name} whitened advantages", ours, advantages)

    for epoch, policy in enumerate(weights):
        _, now, _ = replay(directory, policy, rollout, config)
        loss = masked_mean(clipped_policy_loss(now.policy, scores.policy, ours, CLIP, mask), mask)
        theirs = found["pg_loss_stats"][epoch].squeeze()
        same(f"{name} policy loss, epoch {epoch + 1}", loss, theirs)
        new = values_of(directory, found["weights"]["value_model"][epoch], found)
        value_mask = ~found["padding_mask_p1"]  # TRL's critic learns one state more: after EOS
        value_loss = clipped_value_loss(new, found["values"], found["returns"], 0.2, value_mask)
        theirs = found["vf_loss_stats"][epoch].squeeze()
        same(f"{name} value loss, epoch {epoch + 1}", masked_mean(value_loss, value_mask), theirs)

    if critic == "critic at zero":  # as ours is: constant, which whitening takes away
        logs = found["logs"]
        same(f"{name} step's mean reward", metrics["reward"], logs["objective/scores"])
        same(f"{name} step's mean KL", metrics["kl_ref"], logs["objective/kl"])
        same(f"{name} step's objective", metrics["objective"], logs["objective/rlhf_reward"])
        loss = metrics["policy_loss"] * bessel
        same(f"{name} step's policy loss, two epochs", loss, logs["loss/policy_avg"])
        _, _, after = replay(directory, weights[0], rollout, settings_of(directory, 1, "ppo", ONCE))
        same_update(name, weights[0], after, weights[1], same)


@torch.no_grad()
def values_of(directory: Path, weights: dict[str, Tensor], found: dict[str, Any]) -> Tensor:
    """(N, T) TRL's critic with given weights, read where TRL reads it."""
    config = AutoConfig.from_pretrained(directory / "sft", num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config)
    model.load_state_dict(weights)
    sequences = torch.cat([found["queries"], found["responses"]], 1)
    P = found["queries"].shape[1]
    mask = torch.cat([torch.ones_like(found["queries"]), (~found["padding_mask"]).long()], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    hidden = model.eval().model(sequences, attention_mask=mask, position_ids=positions)
    return model.score(hidden.last_hidden_state)[:, P - 1 : -1, 0]


def compare_groups(directory: Path, kind: str, found: dict[str, Any], same: Comparison) -> None:
    """Against RLOOTrainer or GRPOTrainer."""
    prompts, completions = found["prompt_ids"], found["scored"]["completions"]
    rollout = rollout_of(prompts, completions)
    mask = rollout.sequences.mask
    config = settings_of(directory, 1, "rloo", ONCE)
    _, scores, after = replay(directory, found["losses"][0]["weights"], rollout, config)
    ratios = token_log_ratios(scores.sft, scores.base, mask)
    reward = masked_sum(ratios, mask, 1)
    name = kind.upper() + ":"
    same(f"{name} reward of each response", reward, found["scored"]["rewards"])

    # TRL shuffles the rows before the update: find each again.
    places = {(*p, *c): i for i, (p, c) in enumerate(zip(prompts, completions, strict=True))}
    inputs = found["losses"][0]["inputs"]
    rows = torch.tensor(
        [
            places[(*p[pm.bool()].tolist(), *c[cm.bool()].tolist())]
            for p, pm, c, cm in zip(
                *(
                    inputs[f"{part}_{x}"]
                    for part in ("prompt", "completion")
                    for x in ("ids", "mask")
                ),
                strict=True,
            )
        ]
    )
    penalty = KL_COEF * masked_sum(k1(scores.policy, scores.sft), mask, 1)
    if kind == "rloo":
        old = masked_sum(scores.policy, mask, 1)
        same(f"{name} log-probability of each response", old[rows], inputs["old_logps"])
        advantages = leave_one_out(reward - penalty, config.responses_per_prompt)
        same(f"{name} advantages, KL penalty included", advantages[rows], inputs["advantages"])
        before, theirs = (step["weights"] for step in found["losses"])
        same_update(name, before, after, theirs, same)
        return
    k = config.responses_per_prompt
    advantages = leave_one_out(reward, k) * (k - 1) / k  # GRPO's mean includes the response itself
    same(f"{name} advantages", advantages[rows], inputs["advantages"])
    for epoch, step in enumerate(found["losses"]):
        _, now, _ = replay(directory, step["weights"], rollout, config)
        token = clipped_policy_loss(
            now.policy, scores.policy, advantages[:, None].expand(mask.shape), CLIP, mask
        )
        ratio = (now.policy - scores.policy).exp()  # TRL weights its penalty by it
        loss = masked_mean(token + KL_COEF * ratio * k3(now.policy, scores.sft), mask)
        same(f"{name} loss with k3 penalty, epoch {epoch + 1}", loss, step["loss"])


def same_update(
    name: str,
    before: dict[str, Tensor],
    ours: dict[str, Tensor],
    theirs: dict[str, Tensor],
    same: Comparison,
) -> None:
    """The policy after one update: the norm of the difference over that of the update.

    AdamW's first step is the sign of the gradient, and where that is rounding, so is the sign.
    """
    difference, step = (
        torch.cat([(x[key] - y[key]).flatten() for key in before]).norm()
        for x, y in ((ours, theirs), (theirs, before))
    )
    same(f"{name} weights after one update, difference over step", difference / step, 0.0, 0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench/same_work"))
    parser.add_argument("--peers", nargs="+", default=PEERS, choices=PEERS)
    arguments = parser.parse_args()
    directory = arguments.out
    build(SIZES["tiny"], directory)
    same = Comparison()
    if "ppo" in arguments.peers:
        for critic, spread in {"critic at zero": "0", "critic at random": "0.05"}.items():
            file = directory / "ppo.pt"
            start([str(PEER), "capture.py", str(directory), str(file), "ppo", spread])
            compare_ppo(directory, torch.load(file), same, critic)
    for kind in ("rloo", "grpo"):
        if kind in arguments.peers:
            file = directory / f"{kind}.pt"
            start([sys.executable, "capture.py", str(directory), str(file), kind])
            compare_groups(directory, kind, torch.load(file), same)
    sys.exit(same.failed)


if __name__ == "__main__":
    main()
