"""Several processes on this machine, as torchrun would start them, and what each of them does."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import enumerable
import tiny
from srppo import distributed
from srppo.config import PPOConfig, SFTConfig
from srppo.config_model import LoRAConfig, ModelConfig
from srppo.data.chat import Example
from srppo.models.batching import Sequences, microbatches
from srppo.models.load import load_model
from srppo.models.memory import activation_checkpointing
from srppo.models.roles import Roles
from srppo.models.start import start_frozen
from srppo.progress import Reporter
from srppo.rollout.hf import HFSampler
from srppo.train.metrics import MetricsLog
from srppo.train.ppo import (
    advantages_of,
    rewards_of,
    score_rollout,
    train_ppo,
    values_under,
)
from srppo.train.sft import train_sft
from srppo.train.update import Experience, Optimizers, accumulate


def together(n: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """`work(*args)` in n processes; what each returned. One: in this process."""
    if n == 1:
        return [work(*args)]
    port = free_port()
    results = torch.multiprocessing.get_context("spawn").Queue()
    spawned = torch.multiprocessing.spawn(_enter, (n, port, results, work, args), n, join=False)
    found = dict(results.get(timeout=300) for _ in range(n))
    while not spawned.join():
        pass
    return [found[k] for k in range(n)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


def _enter(rank: int, n: int, port: int, results: Any, work: Callable[..., Any], args: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(n),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    with distributed.joined():
        results.put((rank, work(*args)))


PROMPTS = [[1], [2, 3, 4], [3, 1], [4, 4, 4, 4, 4], [5], [6, 2]]
SETTINGS = {
    "rollouts_per_step": 13,  # no number of processes divides it
    "minibatch_size": 5,
    "max_tokens_per_batch": 16,  # several passes, and another number in each process
    "steps": 10,
    "learning_rate": 1e-4,
    "kl_coef": 0.5,
}


def write_models(folder: Path, architecture: str = "llama") -> None:
    """With smaller weights than tiny's: those amplify rounding, so that alone, too, gradients
    differ by 2e-6 when batches are cut otherwise."""
    for name, seed in (("base", 1), ("sft", 2)):
        model = tiny.model(architecture, seed)
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.data /= 2
        model.save_pretrained(folder / name)


def as_numpy(x: Tensor) -> Any:
    """Whole, and of a kind that passes between processes by value."""
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone().numpy()


def train(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The gradients of the first minibatch, and ten steps from the same start."""
    settings = {**SETTINGS, **settings}
    model = ModelConfig(
        base=str(folder / "base"),
        device="cpu",
        shard=settings.pop("shard", False),
        lora=LoRAConfig(rank=2) if settings.pop("lora", False) else None,
    )
    config = PPOConfig(**settings)
    found: dict[str, Any] = {}
    for steps in (0, config.steps):
        base, sft = start_frozen(model, folder / "sft", 0)
        roles = Roles.begin(base, sft, config.estimator == "ppo", config.compute)
        sampler = HFSampler(
            roles.policy,
            eos_token_id=enumerable.EOS,
            max_new_tokens=6,
            max_tokens_per_batch=config.max_tokens_per_batch,
            critic=roles.critic,
            compute=config.compute,
        )
        if not steps:
            found |= gradients(roles, sampler, config)
            continue
        with (
            MetricsLog(folder, "ppo") as log,
            roles.policy.active() as active,  # as a run does
            activation_checkpointing(active, config.gradient_checkpointing),
        ):
            train_ppo(
                roles, sampler, PROMPTS, config, seed=3, log=log, reporter=Reporter(quiet=True)
            )
        found["weights"] = [as_numpy(p) for p in roles.policy.parameters()]
        found["rollout after"] = as_numpy(sampler.sample(PROMPTS, 8).sequences.response_ids)
    return found


def train_each(folder: Path, kinds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {name: train(folder, settings) for name, settings in kinds.items()}


def fine_tune(folder: Path, settings: dict[str, Any]) -> list[Any]:
    """The weights after stage 1 on twelve demonstrations."""
    examples = [
        Example(prompt, [2 + i, 3, enumerable.EOS])
        for i, prompt in enumerate([*PROMPTS, *reversed(PROMPTS)])
    ]
    model = load_model(str(folder / "base"))
    with MetricsLog(folder, "sft") as log:
        train_sft(
            model,
            tiny.tokenizer(),
            examples,
            SFTConfig(**settings),
            seed=1,
            log=log,
            reporter=Reporter(quiet=True),
        )
    return [as_numpy(p) for p in model.parameters()]


def work_of(sequences: Sequences, max_tokens: int) -> tuple[int, list[list[int]]]:
    """How many batches, and the rows with response tokens in each."""
    rows = torch.arange(len(sequences))
    batches = list(microbatches(sequences, rows, max_tokens, torch.device("cpu")))
    return len(batches), [batch.rows[batch.mask.any(1)].tolist() for batch in batches]


def gradients(roles: Roles, sampler: HFSampler, config: PPOConfig) -> dict[str, Any]:
    pairs = [PROMPTS[i // 2 % len(PROMPTS)] for i in range(config.rollouts_per_step)]
    rollout = sampler.sample(pairs, 7)
    scores = score_rollout(roles, rollout, config)
    rewards = rewards_of(rollout, scores, config)
    values = values_under(roles.critic, rollout, scores, rewards, config)
    advantages, returns = advantages_of(rewards, values, scores, rollout, config)
    experience = Experience(rollout, scores.policy, values, advantages, returns, scores.frozen)
    optimizers = Optimizers(roles, config)
    metrics = accumulate(roles, experience, torch.tensor([0, 3, 4, 7, 12]), config)
    optimizers.add_up()
    critic = roles.critic.parameters() if roles.critic else []
    return {
        "rollout": as_numpy(rollout.sequences.response_ids),
        "logprobs": as_numpy(rollout.logprobs),
        "advantages": as_numpy(advantages),
        "gradients": [as_numpy(p.grad) for p in roles.policy.parameters() if p.grad is not None],
        "critic": [as_numpy(p.grad) for p in critic],
        "metrics": metrics,
    }
