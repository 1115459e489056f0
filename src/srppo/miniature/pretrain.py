"""Pretrains the miniature's base model from scratch: a Llama of 0.35 million parameters.

    python -m srppo.miniature.pretrain --out DIR [--seed 0] [--steps 3000]
    python -m srppo.miniature.pretrain --check

One core, about four minutes. The result depends on nothing but seed, steps and the arithmetic of
the machine (torch version, processor), so the packaged model can be regenerated bit by bit:
`--check` does that and compares with its manifest.
"""

import argparse
import hashlib
import json
import math
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from srppo.miniature import BASE
from srppo.miniature.corpus import BOS, EOS, document
from srppo.miniature.tokenizer import PAD, POSITIONS, build_tokenizer, vocabulary

STEPS = 3000
DOCUMENTS_PER_STEP = 64
LEARNING_RATE = 3e-3
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.05
EARLY_STEPS = 30
"""A hash is also taken here: enough to tell a changed world or model within seconds."""


@dataclass(frozen=True)
class Pretrained:
    """A trained model, the loss over its last steps (nats per token), and its early hash."""

    model: Any
    loss: float
    early_sha256: str


def pretrain(seed: int = 0, steps: int = STEPS, stop_after: int | None = None) -> Pretrained:
    """Train from scratch; `stop_after` ends a run of `steps` early, the schedule unchanged.

    The global random state and the number of threads are as before when this returns.
    """
    last_step = steps if stop_after is None else stop_after
    losses: list[float] = []
    early = ""
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_architecture())
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=LEARNING_RATE,
            betas=(0.9, 0.95),
            weight_decay=WEIGHT_DECAY,
            fused=True,
        )
        batches = _batches(seed)
        for step in range(last_step):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * _schedule(step, steps)
            loss = _loss(model, next(batches))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if step + 1 == min(EARLY_STEPS, last_step):
                early = weights_sha256(model.state_dict())
            if (step + 1) % 50 == 0 or step + 1 == last_step:
                end = "\n" if step + 1 == last_step else "\r"
                print(
                    f"pretrain  step {step + 1}/{last_step}  loss {_recent(losses):.3f} nats/token",
                    end=end,
                    file=sys.stderr,
                    flush=True,
                )
    return Pretrained(model.eval(), _recent(losses), early)


def save(trained: Pretrained, out: Path, seed: int, steps: int) -> dict[str, Any]:
    """Write model, tokenizer and manifest.json, whole or not at all; returns the manifest."""
    aside = out.with_name(f"{out.name}.part")
    trained.model.save_pretrained(aside)
    build_tokenizer().save_pretrained(aside)
    manifest = {
        "seed": seed,
        "steps": steps,
        **environment(),
        "early_sha256": trained.early_sha256,
        "sha256": weights_sha256(trained.model.state_dict()),
        "loss": round(trained.loss, 4),
    }
    (aside / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    aside.replace(out)
    return manifest


def read_manifest(directory: Path = BASE) -> dict[str, Any]:
    """The manifest of a pretrained model; by default, of the packaged one."""
    manifest: dict[str, Any] = json.loads((directory / "manifest.json").read_text())
    return manifest


def environment() -> dict[str, str]:
    """What the bits of the result depend on besides seed and steps."""
    return {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Hash of names, shapes and bytes of all weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name} {tuple(state[name].shape)} {state[name].dtype}".encode())
        digest.update(state[name].detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def check() -> bool:
    """Regenerate the packaged base and compare: True if it is the same.

    On another processor or torch version the bits may differ; then the losses are compared.
    """
    recorded = read_manifest()
    trained = pretrain(recorded["seed"], recorded["steps"])
    sha256 = weights_sha256(trained.model.state_dict())
    if sha256 == recorded["sha256"]:
        print("The packaged base is reproduced bit by bit.")
        return True
    here = environment()
    differences = [
        f"{key} {recorded[key]} -> {here[key]}" for key in here if here[key] != recorded[key]
    ]
    print(f"Other bits: loss {trained.loss:.4f}, recorded {recorded['loss']:.4f}.")
    if not differences:
        print("The environment is the recorded one, so world, model or training have changed.")
        return False
    print(f"The environment differs from the recorded one ({', '.join(differences)}).")
    return abs(trained.loss - recorded["loss"]) < 0.02


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m srppo.miniature.pretrain",
        description="Pretrain the miniature's base model from scratch (one core, four minutes).",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="directory to write the model to")
    what.add_argument("--check", action="store_true", help="regenerate the packaged base, compare")
    parser.add_argument("--seed", type=int, default=0, help="with --out (default 0)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"with --out (default {STEPS})")
    arguments = parser.parse_args()
    if arguments.check:
        raise SystemExit(0 if check() else 1)
    if arguments.out.is_dir() and any(arguments.out.iterdir()):
        parser.error(f"{arguments.out} is not empty, and would be overwritten. Give another --out.")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    manifest = save(
        pretrain(arguments.seed, arguments.steps), arguments.out, arguments.seed, arguments.steps
    )
    print(json.dumps(manifest, indent=2))


def _architecture() -> LlamaConfig:
    ids = {token: i for i, token in enumerate(vocabulary())}
    return LlamaConfig(
        vocab_size=len(ids),
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
        pad_token_id=ids[PAD],
        dtype="float32",
    )


def _batches(seed: int) -> Iterator[Tensor]:
    """Endless batches (B, T) of token ids, right-padded."""
    ids = {token: i for i, token in enumerate(vocabulary())}
    rng = Random(f"pretrain {seed}")
    while True:
        documents = [document(rng) for _ in range(DOCUMENTS_PER_STEP)]
        longest = max(map(len, documents))
        yield torch.tensor(
            [[ids[t] for t in d] + [ids[PAD]] * (longest - len(d)) for d in documents]
        )


def _loss(model: Any, batch: Tensor) -> Tensor:
    """Mean NLL over all tokens, prompts included: nats per token."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    padding = vocabulary().index(PAD)
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), ignore_index=padding)


def _schedule(step: int, steps: int) -> float:
    """Fraction of the peak learning rate: linear warm-up, then cosine to zero."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return warmup * 0.5 * (1 + math.cos(math.pi * step / steps))


def _recent(losses: list[float]) -> float:
    last = losses[-100:]
    return sum(last) / len(last)


def _processor() -> str:
    """Vendor, family and model: libraries choose their kernels by them."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor()
    pairs = (line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    facts = {key.strip(): value.strip() for key, value in reversed(list(pairs))}
    keys = ("vendor_id", "cpu family", "model")
    return " ".join(facts[key] for key in keys if key in facts)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in a fixed order; restores the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
