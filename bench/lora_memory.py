"""Peak memory of a PPO step with adapters, against that of the policy's own update alone.

    python bench/lora_memory.py [--layers 8 --width 384 --vocab 8192 --prompts 64 --estimator rloo]

Both run in processes of their own, on the same responses: `step` is rollout, scoring and update
with all roles; `update` has the policy's weights and adapter, and trains on what `step` sampled.
Peaks are above what the process held before the first model. One JSON line; Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from srppo.config import LoRAConfig, PPOConfig
from srppo.models.lora import Backbone
from srppo.models.roles import Roles
from srppo.progress import Reporter
from srppo.rollout.hf import HFSampler
from srppo.train.metrics import MetricsLog
from srppo.train.ppo import train_ppo
from srppo.train.update import Experience, Optimizers, generator, update

EOS = 0


def backbone(args: argparse.Namespace) -> Backbone:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.width,
        intermediate_size=round(args.width * 8 / 3),
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 32,
        num_key_value_heads=args.width // 32,
        max_position_embeddings=256,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    return Backbone(LlamaForCausalLM(config).eval(), LoRAConfig(), seed=0)


def settings(args: argparse.Namespace) -> PPOConfig:
    return PPOConfig(
        steps=1,
        estimator=args.estimator,
        responses_per_prompt=2 if args.estimator == "rloo" else 1,
        rollouts_per_step=args.prompts,
        minibatch_size=args.prompts,
        max_tokens_per_batch=args.tokens,
        max_kl=1e9,
    )


def whole_step(args: argparse.Namespace, rollout_file: Path) -> None:
    weights = backbone(args)
    sft = weights.new()
    for name, p in weights.model.named_parameters():
        if "lora_B" in name:  # zero at first, and a reward of zero is refused
            torch.nn.init.normal_(p, std=1e-3)
    config = settings(args)
    roles = Roles.begin(weights.bare(), sft, critic=args.estimator == "ppo")
    sampler = HFSampler(
        roles.policy,
        eos_token_id=EOS,
        max_new_tokens=128,
        max_tokens_per_batch=args.tokens * 4,
        critic=roles.critic,
    )
    sample = sampler.sample

    def remembered(*a, **k):
        rollout = sample(*a, **k)
        # These models never end a response; the trainer refuses rollouts in which none ends.
        rollout = replace(rollout, ended=torch.ones_like(rollout.ended))
        torch.save(rollout, rollout_file)
        return rollout

    sampler.sample = remembered
    prompts = torch.randint(1, args.vocab, (args.prompts, 64)).tolist()
    with tempfile.TemporaryDirectory() as scratch, MetricsLog(Path(scratch), "ppo") as log:
        train_ppo(roles, sampler, prompts, config, seed=0, log=log, reporter=Reporter(quiet=True))


def update_alone(args: argparse.Namespace, rollout_file: Path) -> None:
    policy = backbone(args).new()
    config = settings(args)
    roles = Roles(base=None, sft=None, policy=policy, critic=None)
    rollout = torch.load(rollout_file, weights_only=False)
    y = rollout.sequences
    zero, advantages = torch.zeros(y.mask.shape), torch.randn(y.mask.shape)
    experience = Experience(rollout, zero, zero, advantages, zero)
    update(roles, experience, Optimizers(roles, config), config, generator(0))


def resident(key: str) -> int:
    """Bytes: VmRSS now, VmHWM at most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--estimator", default="rloo")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.measure:
        what, file = args.measure
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        {"step": whole_step, "update": update_alone}[what](args, Path(file))
        print(resident("VmHWM") - before)
        return
    peaks = {}
    with tempfile.TemporaryDirectory() as scratch:
        for what in ("step", "update"):
            command = [sys.executable, *sys.argv, "--measure", what, f"{scratch}/rollout.pt"]
            # Freed tensors go back to the system at once, so that what is resident is in use.
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, env=environment
            )
            if done.returncode:
                sys.exit(done.stderr)
            peaks[what] = int(done.stdout.splitlines()[-1])
    weights = sum(p.nbytes for p in backbone(args).model.parameters())
    megabytes = {f"{k}_mb": round(v / 1e6) for k, v in {**peaks, "weights": weights}.items()}
    print(json.dumps({**megabytes, "ratio": round(peaks["step"] / peaks["update"], 2)}))


if __name__ == "__main__":
    main()
