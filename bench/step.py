"""One PPO step of our engine: seconds by phase and peak memory, as one JSON line.

    python bench/step.py [--layers 6 --width 256 --vocab 8192 --prompts 64 --steps 3]

A random Llama (9 M parameters unless said), prompts of 64 tokens, responses of up to 128 that end
at random (a raised EOS bias gives each token a chance of about 1/64), one epoch, one minibatch.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from srppo.config import PPOConfig
from srppo.models.roles import Roles
from srppo.progress import Reporter
from srppo.rollout.hf import HFSampler
from srppo.train.metrics import MetricsLog
from srppo.train.ppo import train_ppo

EOS = 0
PHASES = ("time/rollout", "time/scoring", "time/update", "time/tokens_per_second")


def random_llama(args: argparse.Namespace, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=args.vocab,
            hidden_size=args.width,
            intermediate_size=round(args.width * 8 / 3),
            num_hidden_layers=args.layers,
            num_attention_heads=args.width // 32,
            num_key_value_heads=args.width // 32,
            max_position_embeddings=256,
            eos_token_id=EOS,
            bos_token_id=None,
            pad_token_id=None,
        )
    )
    return model.eval()


def end_at_random(model: PreTrainedModel, vocab: int) -> None:
    """A near-uniform model with EOS at odds of 1 to 63."""

    def raise_eos(module: object, inputs: object, output: CausalLMOutputWithPast) -> None:
        output.logits[..., EOS] = output.logits[..., 1:].logsumexp(-1).detach() - 4.14

    model.register_forward_hook(raise_eos)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    base, sft = random_llama(args, 0), random_llama(args, 1)
    roles = Roles.begin(base, sft, critic=True)
    end_at_random(roles.policy, args.vocab)
    sampler = HFSampler(roles.policy, eos_token_id=EOS, max_new_tokens=128, critic=roles.critic)
    prompts = torch.randint(1, args.vocab, (args.prompts, 64)).tolist()
    config = PPOConfig(
        steps=args.steps,
        rollouts_per_step=args.prompts,
        minibatch_size=args.prompts,
        max_tokens_per_batch=2048,
        max_kl=1e9,
    )
    with tempfile.TemporaryDirectory() as scratch:
        with MetricsLog(Path(scratch), "ppo") as log:
            train_ppo(
                roles, sampler, prompts, config, seed=0, log=log, reporter=Reporter(quiet=True)
            )
        lines = (Path(scratch) / "metrics" / "ppo.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    print(
        json.dumps(
            {
                "parameters": sum(p.numel() for p in base.parameters()),
                "vocab": args.vocab,
                "responses": args.prompts,
                "threads": args.threads,
                "mean_length": steps[0]["response_length"],
                **{p: round(statistics.median(s[p] for s in steps), 3) for p in PHASES},
                "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            }
        )
    )


if __name__ == "__main__":
    main()
