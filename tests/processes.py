"""Several processes on this machine, as torchrun would start them, and what each of them does.

`python tests/processes.py` prints how far their training is from that of one: the largest
differences of the first minibatch's gradients, and of the weights after ten steps.
"""

from __future__ import annotations

import inspect
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

import enumerable
import tiny
from runs import timeless
from srppo import distributed
from srppo.baselines.pairs import train_pairs
from srppo.baselines.weights import extrapolate_weights
from srppo.config import PPOConfig, SFTConfig
from srppo.config_checkpoint import CheckpointConfig
from srppo.config_controls import PairsConfig
from srppo.config_model import LoRAConfig, ModelConfig
from srppo.data.chat import Example
from srppo.models.batching import Sequences, microbatches
from srppo.models.memory import activation_checkpointing
from srppo.models.roles import Roles
from srppo.models.start import start_frozen, start_sft
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
from srppo.train.steps import Keeper
from srppo.train.update import Experience, Optimizers, accumulate


def together(n: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """`work(*args)` in n processes; what each returned. One: in this process."""
    if n == 1:
        return [work(*args)]
    # From a process that has imported what takes seconds, and has no threads yet.
    torch.multiprocessing.set_forkserver_preload(["srppo.models.roles", "srppo.train.sft"])
    results = torch.multiprocessing.get_context("forkserver").Queue()
    started = torch.multiprocessing.start_processes(
        _enter,
        (n, free_port(), results, work, args),
        n,
        join=False,
        start_method="forkserver",
    )
    found = dict(results.get(timeout=300) for _ in range(n))
    while not started.join():
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

PAIRS = {"responses_per_prompt": 2, "rollouts_per_step": 14}
KINDS = {
    "whole models": {},
    "sharded": {"shard": True},
    "adapters": {"lora": True},
    "adapters on sharded weights": {"lora": True, "shard": True},
    "sharded, sampled in pieces": {"shard": True, "shard_sampling": True},
    "adapters, sampled in pieces": {"lora": True, "shard": True, "shard_sampling": True},
    "sharded, frozen models in CPU memory": {"shard": True, "offload": True},
    "sharded, activations computed again": {"shard": True, "gradient_checkpointing": True},
    "RLOO, sharded": {"shard": True, "estimator": "rloo", **PAIRS},
    "all-action": {"estimator": "all_action", **PAIRS},
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


def model_config(folder: Path, settings: dict[str, Any]) -> ModelConfig:
    """Of the models in `folder`; takes what concerns models out of `settings`."""
    dropout = settings.pop("dropout", 0.0)
    return ModelConfig(
        base=str(folder / "base"),
        device="cpu",
        shard=settings.pop("shard", False),
        shard_sampling=settings.pop("shard_sampling", False),
        offload=settings.pop("offload", False),
        lora=LoRAConfig(rank=2, dropout=dropout) if settings.pop("lora", False) else None,
    )


def as_numpy(x: Tensor) -> Any:
    """Whole, and of a kind that passes between processes by value."""
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone().numpy()


def train(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The gradients of the first minibatch, and ten steps from the same start."""
    roles, sampler, config = begin(folder, settings)
    found = gradients(roles, sampler, config)
    roles, sampler, config = begin(folder, settings)
    take_steps(folder, roles, sampler, config)
    found["weights"] = [as_numpy(p) for p in roles.policy.parameters()]
    found["rollout after"] = as_numpy(sampler.sample(PROMPTS, 8).sequences.response_ids)
    return found


def begin(folder: Path, settings: dict[str, Any]) -> tuple[Roles, HFSampler, PPOConfig]:
    settings = {**SETTINGS, **settings}
    model = model_config(folder, settings)
    config = PPOConfig(**settings)
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
    return roles, sampler, config


def take_steps(folder: Path, roles: Roles, sampler: HFSampler, config: PPOConfig) -> None:
    with (
        MetricsLog(folder, "ppo") as log,
        roles.policy.active() as active,  # as a run does
        activation_checkpointing(active, config.gradient_checkpointing),
    ):
        train_ppo(roles, sampler, PROMPTS, config, seed=3, log=log, reporter=Reporter(quiet=True))


def gathered_bytes(folder: Path, settings: dict[str, Any]) -> float:
    """What this process sends in a step, in a ring, by torch's own calls for weights in pieces."""
    roles, sampler, config = begin(folder, settings)
    sent = 0.0
    share = (distributed.size() - 1) / distributed.size()

    def counted(call: Callable[..., Any], whole: str) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            nonlocal sent
            sent += share * inspect.signature(call).bind(*args, **kwargs).arguments[whole].nbytes
            return call(*args, **kwargs)

        return count

    wholes = {
        "all_gather_into_tensor": "output_tensor",
        "all_gather_single": "output_tensor",  # what newer torch calls it
        "reduce_scatter_tensor": "input",
        "reduce_scatter_single": "input",
    }
    with ExitStack() as stack:
        for name, whole in wholes.items():
            if call := getattr(dist, name, None):
                stack.enter_context(mock.patch.object(dist, name, counted(call, whole)))
        take_steps(folder, roles, sampler, config)
    return sent


def train_each(folder: Path, kinds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {name: train(folder, settings) for name, settings in kinds.items()}


def fine_tune(folder: Path, settings: dict[str, Any], kept: Path | None = None) -> list[Any]:
    """The weights after stage 1 on twelve demonstrations; `kept`: where its checkpoints are."""
    examples = [
        Example(prompt, [2 + i, 3, enumerable.EOS])
        for i, prompt in enumerate([*PROMPTS, *reversed(PROMPTS)])
    ]
    settings = {**settings}
    models = model_config(folder, settings)
    config = SFTConfig(**settings)
    role = start_sft(models, 0, config.compute)
    every = CheckpointConfig(every=1, keep_last=100)
    keeper = Keeper(kept, "sft", every, Reporter(quiet=True)) if kept else None
    begun = keeper.metrics if keeper else ""
    with MetricsLog(kept or folder, "sft", begun) as log, role.active() as model:
        train_sft(
            model,
            tiny.tokenizer(),
            examples,
            config,
            seed=1,
            log=log,
            reporter=Reporter(quiet=True),
            keeper=keeper,
        )
    return [as_numpy(p) for p in role.parameters()]


def fine_tune_on(folder: Path, settings: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """The weights after stage 1, at once and once more from its second step on."""
    kept = folder / f"kept-by-{distributed.size()}"
    if distributed.is_first():
        kept.mkdir()
    distributed.any_of(False)
    whole = fine_tune(folder, settings, kept)
    if distributed.is_first():
        for path in (kept / "checkpoints" / "sft").iterdir():
            if path.name > "step-000002":
                shutil.rmtree(path)
    distributed.any_of(False)
    return whole, fine_tune(folder, settings, kept)


def learn_pairs(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What is logged and the weights after two rounds of SPIN on five demonstrations."""
    settings = {**settings}
    models = model_config(folder, settings)
    _, sft = start_frozen(models, folder / "sft", 0)
    policy = sft.successor()
    examples = [Example(p, [2 + i, 3, enumerable.EOS]) for i, p in enumerate(PROMPTS[:5])]
    log = MetricsLog(folder, f"pairs-{distributed.size()}")
    with log:
        train_pairs(
            policy,
            HFSampler(policy, eos_token_id=enumerable.EOS, max_new_tokens=6),
            examples,
            PairsConfig(**settings),
            seed=1,
            log=log,
            reporter=Reporter(quiet=True),
        )
    distributed.any_of(False)  # the log is written
    return {
        "logged": timeless(log.path),
        "weights": [as_numpy(p) for p in policy.parameters()],
    }


def extrapolate(folder: Path, settings: dict[str, Any]) -> list[Any]:
    """The weights half a step beyond those of pi_sft."""
    base, sft = start_frozen(model_config(folder, {**settings}), folder / "sft", 0)
    policy = sft.successor()
    extrapolate_weights(policy, base, 0.5)
    return [as_numpy(p) for p in policy.parameters()]


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


def main() -> None:
    """A line for each kind and number of processes; seeds are those of `train`."""
    with tempfile.TemporaryDirectory() as scratch:
        write_models(Path(scratch))
        (alone,) = together(1, train_each, Path(scratch), KINDS)
        for n in (2, 4):
            each = together(n, train_each, Path(scratch), KINDS)
            for kind, one in alone.items():
                off = {
                    key: max(
                        abs(a - b).max(initial=0)
                        / max(1, *(abs(x).max(initial=0) for x in one[key]))
                        for found in each
                        for a, b in zip(found[kind][key], one[key], strict=True)
                    )
                    for key in ("gradients", "weights")
                }
                same = all(
                    (found[kind][key] == one[key]).all()
                    for found in each
                    for key in ("rollout", "rollout after")
                )
                print(
                    f"{n} processes, {kind}: gradients {off['gradients']:.1e}, weights "
                    f"{off['weights']:.1e}, rollouts {'the same' if same else 'others'}"
                )


if __name__ == "__main__":
    main()
