"""Our engine: all that the benchmark knows of it.

    .venv/bin/python bench/ours.py DIR STEPS SEED VARIANT [SETTING=VALUE ...]

Settings (JSON) go over the variant's.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import srppo
from srppo.config import PPOConfig
from srppo.models.batching import Sequences
from srppo.models.roles import Roles
from srppo.progress import Reporter
from srppo.rollout.hf import HFSampler
from srppo.rollout.sampler import Rollout, Sampler
from srppo.train.cost import Shape, step_flops
from srppo.train.ppo import Scores, score_rollout, train_ppo
from workload import EOS, GROUP, StepClock, load, load_case

VARIANTS: dict[str, dict[str, object]] = {
    "ppo": {"estimator": "ppo"},
    "ppo-bf16": {"estimator": "ppo", "compute": "bfloat16"},
    "all-action": {"estimator": "all_action"},
    "rloo": {"estimator": "rloo", "responses_per_prompt": GROUP, "whiten_advantages": False},
}
"""Settings of each row; a new row is a line here and one in run.py."""

COMMON = {"epochs": 1, "kl_coef": 0.2, "learning_rate": 1e-6, "max_tokens_per_batch": 2048}


class StepLog:
    """Takes the trainer's metrics, and reads the clock with them."""

    def __init__(self, clock: StepClock) -> None:
        self.clock, self.steps = clock, []

    def log(self, step: int, values: dict[str, float]) -> None:
        self.clock.tick()
        self.steps.append(values)


class Recorded(Sampler):
    """A sampler that keeps what it sampled.

    Responses that no EOS ends count as ended: at full length all are cut off, which the trainer
    would refuse, and the work is the same.
    """

    def __init__(self, sampler: HFSampler) -> None:
        self.sampler, self.rollouts = sampler, []

    def sample(self, prompts: list[list[int]], seed: int, temperature: float = 1.0) -> Rollout:
        rollout = self.sampler.sample(prompts, seed, temperature)
        self.rollouts.append(replace(rollout, ended=torch.ones_like(rollout.ended)))
        return self.rollouts[-1]


def settings_of(directory: Path, steps: int, variant: str, changes: dict[str, object]) -> PPOConfig:
    case, _ = load_case(directory)
    fixed = {
        "steps": steps,
        "rollouts_per_step": case.prompts,
        "minibatch_size": case.prompts,
        "max_kl": 1e9,
    }
    return PPOConfig(**COMMON | fixed | VARIANTS[variant] | changes)


def begin(directory: Path, config: PPOConfig) -> tuple[Roles, HFSampler]:
    """Models and sampler as a run has them."""
    case, _ = load_case(directory)
    base, sft = load(directory, "base"), load(directory, "sft")
    roles = Roles.begin(base, sft, critic=config.estimator == "ppo")
    sampler = HFSampler(
        roles.policy,
        eos_token_id=EOS,
        max_new_tokens=case.response_tokens,
        critic=roles.critic,
        compute=config.compute,
    )
    return roles, sampler


def measure(directory: Path, seed: int, config: PPOConfig) -> dict[str, object]:
    """Train; seconds of each phase, operations needed, and the error of the log-ratios."""
    _, prompts = load_case(directory)
    prompts = prompts[: len(prompts) // config.responses_per_prompt]
    roles, sampler = begin(directory, config)
    clock = StepClock()
    recorded, log = Recorded(sampler), StepLog(clock)
    train_ppo(roles, recorded, prompts, config, seed=seed, log=log, reporter=Reporter(quiet=True))

    lengths = [rollout.sequences.lengths.tolist() for rollout in recorded.rollouts]
    clock.lengths = [n for some in lengths for n in some]
    report = clock.report()  # before anything below adds to the peak
    shape = Shape.of(roles.policy.model)
    flops = [
        step_flops(shape, [len(p) for p in rollout.sequences.prompt_ids], some, config.epochs)
        for rollout, some in zip(recorded.rollouts, lengths, strict=True)
    ]
    phases = {
        name: [step[f"time/{name}"] for step in log.steps[1:]]
        for name in ("rollout", "scoring", "update")
    }
    wall = report["wall_seconds"]
    phases["other"] = [w - sum(some) for w, *some in zip(wall, *phases.values(), strict=True)]
    return report | {
        "version": f"srppo {srppo.__version__}",
        "phases": phases,
        "gflop_needed": [f.total / 1e9 for f in flops[1:]],
        "attainable_gflops": attainable(),
        "log_ratio_error": log_ratio_error(directory, roles, recorded.rollouts[-1], config),
    }


def attainable(size: int = 1024, seconds: float = 1.0) -> float:
    """GFLOP per CPU second of large float32 matrix products: the best of a second's worth."""
    a, b = torch.randn(2, size, size)
    best, began = float("inf"), time.process_time()
    while time.process_time() - began < seconds:
        start = time.process_time()
        a @ b
        best = min(best, time.process_time() - start)
    return 2 * size**3 / best / 1e9


def log_ratio_error(
    directory: Path, roles: Roles, rollout: Rollout, config: PPOConfig
) -> dict[str, float]:
    """Nats per response that scoring is off by, against a plain float32 pass of each model."""
    scores = score_rollout(roles, rollout, config)
    ours = torch.where(rollout.sequences.mask, scores.sft - scores.base, 0.0).sum(1)
    plain = plain_logprobs(directory, "sft", rollout) - plain_logprobs(directory, "base", rollout)
    errors = ours - plain
    return {"rms": float(errors.square().mean().sqrt()), "max": float(errors.abs().max())}


@torch.no_grad()
def plain_logprobs(directory: Path, name: str, rollout: Rollout) -> Tensor:
    """(N,) nats, one response after the other, summed in float64."""
    model, y = load(directory, name), rollout.sequences
    sums = []
    for prompt, response, n in zip(y.prompt_ids, y.response_ids, y.lengths.tolist(), strict=True):
        ids = torch.cat([torch.tensor(prompt), response[:n]])
        logprobs = model(ids[None], use_cache=False).logits[0].double().log_softmax(-1)
        sums.append(logprobs[len(prompt) - 1 : -1].gather(1, response[:n, None]).sum())
    return torch.stack(sums)


class Replayed(Sampler):
    """A sampler that gives one rollout, in the order in which its prompts are asked for."""

    def __init__(self, rollout: Rollout) -> None:
        self.rollout = rollout

    def sample(self, prompts: list[list[int]], seed: int, temperature: float = 1.0) -> Rollout:
        places: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in enumerate(self.rollout.sequences.prompt_ids):
            places.setdefault(tuple(prompt), []).append(row)
        rows = torch.tensor([places[tuple(prompt)].pop(0) for prompt in prompts])
        y = self.rollout.sequences
        return Rollout(
            Sequences(prompts, y.response_ids[rows], y.mask[rows]),
            self.rollout.logprobs[rows],
            self.rollout.ended[rows],
        )


def replay(
    directory: Path, policy: dict[str, Tensor], rollout: Rollout, config: PPOConfig
) -> tuple[dict[str, float], Scores, dict[str, Tensor]]:
    """One step of the trainer on given responses, as if the policy had sampled them: its metrics,
    scores and the policy after it."""
    roles, _ = begin(directory, config)
    roles.policy.model.load_state_dict(policy)
    scores = score_rollout(roles, rollout, config)
    rollout = replace(rollout, logprobs=scores.policy)
    log = StepLog(StepClock())
    prompts = rollout.sequences.prompt_ids[:: config.responses_per_prompt]
    reporter = Reporter(quiet=True)
    train_ppo(roles, Replayed(rollout), prompts, config, seed=0, log=log, reporter=reporter)
    return log.steps[0], scores, roles.policy.model.state_dict()


def main() -> None:
    directory, steps, seed, variant = Path(sys.argv[1]), *map(int, sys.argv[2:4]), sys.argv[4]
    changes = {key: json.loads(value) for key, value in (x.split("=", 1) for x in sys.argv[5:])}
    torch.set_num_threads(1)
    report = measure(directory, seed, settings_of(directory, steps, variant, changes))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
