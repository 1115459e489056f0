"""What a step of stage 2 takes with several processes on this machine, beside docs/scaling.md.

    .venv/bin/python bench/processes.py

Prints a line for each number of processes and kind, writes them to runs/bench/processes.jsonl, and
draws measured against formula, with the points of bench/scaling.py where runs/bench/scaling.jsonl
is there, to runs/bench/processes.svg. Memory is the most that a process gained since it imported
everything, of those beside the first, which also reads the models. Memory and bytes sent are those
of `srppo run --dry-run`, nothing fitted. Seconds are CPU seconds of a process, so that other work
beside it does not count; by the formula those of one process, divided by the processes, and what
is sent at the rate of sums of 64 MB over all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scaling import Case, Point, compare, phase_seconds
from srppo import distributed
from srppo.config import Recipe, parse_recipe
from srppo.models.memory import activation_checkpointing
from srppo.models.roles import Roles
from srppo.models.start import start_frozen
from srppo.plan.architecture import Blueprint
from srppo.plan.exchange import Exchange
from srppo.plan.memory import phases
from srppo.progress import Reporter
from srppo.rollout.hf import HFSampler
from srppo.train.metrics import MetricsLog
from srppo.train.ppo import train_ppo

PROMPT, RESPONSE = 16, 24
ROLLOUTS = 8  # none of them ends; of 16 such ones a step would be refused
KINDS: dict[str, dict[str, Any]] = {
    "whole": {},
    "sharded": {"model": {"shard": True}},
    "sharded, recomputed": {"model": {"shard": True}, "ppo": {"gradient_checkpointing": True}},
    "sharded, sampled in pieces": {"model": {"shard": True, "shard_sampling": True}},
    "adapters": {"model": {"lora": {"rank": 16}}},
    "adapters, sharded": {"model": {"lora": {"rank": 16}, "shard": True}},
}
CASES = [
    *((1, kind) for kind in ("whole", "adapters")),
    *((2, kind) for kind in KINDS),
    *((4, kind) for kind in ("whole", "sharded", "adapters, sharded")),
]


@dataclass(frozen=True)
class Seen:
    """By one process."""

    seconds: float
    """CPU seconds of a step."""
    peak: float
    """Bytes gained."""
    rate: float
    """Bytes sent per CPU second."""


def write_models(folder: Path) -> None:
    """Two random ones of 35 M weights."""
    for seed, name in enumerate(("base", "sft")):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=8192,
            hidden_size=384,
            intermediate_size=1536,
            num_hidden_layers=12,
            num_attention_heads=6,
            num_key_value_heads=6,
            max_position_embeddings=256,
            bos_token_id=None,
            eos_token_id=0,
        )
        LlamaForCausalLM(config).save_pretrained(folder / name)


def recipe_of(folder: Path, kind: str) -> Recipe:
    """Three steps."""
    changes = KINDS[kind]
    tree: dict[str, Any] = {
        "name": "bench",
        "output_dir": str(folder),
        "model": {"base": str(folder / "base"), "sft": str(folder / "sft"), "device": "cpu"},
        "data": {"prompts": "-", "max_prompt_tokens": PROMPT, "max_response_tokens": RESPONSE},
        "ppo": {
            "steps": 3,
            "rollouts_per_step": ROLLOUTS,
            "minibatch_size": ROLLOUTS,
            "max_tokens_per_batch": 128,
        },
    }
    return parse_recipe({k: {**v, **changes.get(k, {})} if isinstance(v, dict) else v
                         for k, v in tree.items()})  # fmt: skip


def steps(folder: Path, kind: str) -> Seen:
    """Mean of the steps but the first."""
    recipe = recipe_of(folder, kind)
    torch.nn.Linear(64, 64)(torch.ones(64, 64)).sum().backward()  # what loads at first use
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    roles = Roles.begin(*start_frozen(recipe.model, folder / "sft", 0), critic=True)
    sampler = HFSampler(
        roles.policy,
        eos_token_id=0,
        max_new_tokens=RESPONSE,
        max_tokens_per_batch=recipe.ppo.max_tokens_per_batch,
        critic=roles.critic,
    )
    prompts = [list(range(i, i + PROMPT)) for i in range(1, 65)]
    with (
        Stopwatch(folder, "ppo") as log,
        roles.policy.active() as model,
        activation_checkpointing(model, recipe.ppo.gradient_checkpointing),
    ):
        train_ppo(
            roles, sampler, prompts, recipe.ppo, seed=0, log=log, reporter=Reporter(quiet=True)
        )
    peak = resident("VmHWM") - before
    first, *_, last = log.times
    return Seen((last - first) / (len(log.times) - 1), peak, rate())


class Stopwatch(MetricsLog):
    """CPU seconds of this process at the end of each step."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.times: list[float] = []

    def log(self, step: int, values: dict[str, float]) -> None:
        super().log(step, values)
        self.times.append(time.process_time())


def rate(times: int = 4) -> float:
    """Bytes that each process sends per CPU second in sums over all of them."""
    n, numbers = distributed.size(), torch.ones(1 << 24)
    started = time.process_time()
    for _ in range(times):
        distributed.add([numbers])
    return times * 2 * (n - 1) / n * numbers.nbytes / (time.process_time() - started)


def resident(key: str) -> int:
    """Bytes: VmRSS now, VmHWM at most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024


def _enter(rank: int, n: int, port: int, folder: Path, kind: str, results: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with distributed.joined():
        results.put((rank, steps(folder, kind)))


def measure(folder: Path, n: int, kind: str) -> Seen:
    """The slowest and the largest of n processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(_enter, (n, port, folder, kind, results), n)
    _, seen = zip(*sorted(results.get() for _ in range(n)), strict=True)
    return Seen(
        max(s.seconds for s in seen),
        max(s.peak for s in seen[min(1, n - 1) :]),
        min(s.rate for s in seen),
    )


def planned(folder: Path, n: int, kind: str) -> tuple[float, float]:
    """Bytes at the peak, and sent in a step, by the formulas."""
    recipe = recipe_of(folder, kind)
    blueprint = Blueprint.find(recipe.model.base)
    assert blueprint
    longest = PROMPT + RESPONSE, PROMPT
    found = phases(recipe, blueprint, longest, gpu=False, processes=n)
    parts = Exchange(recipe, blueprint.sizes(recipe.model), n, PROMPT + RESPONSE)
    config = recipe.ppo
    sent = parts.rollout(config, ROLLOUTS) + parts.scoring(config, ROLLOUTS)
    return max(phase.total for phase in found), sent + parts.update(config)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """One for each case, printed as it comes."""
    lines: list[dict[str, Any]] = []
    alone: dict[bool, float] = {}
    for n, kind in CASES:
        seen, (memory, sent) = measure(folder, n, kind), planned(folder, n, kind)
        adapters = "adapters" in kind
        alone.setdefault(adapters, seen.seconds)
        seconds = alone[adapters] / n
        seconds += sent / seen.rate if n > 1 else 0.0
        line = {
            "processes": n,
            "kind": kind,
            "seconds": round(seen.seconds, 2),
            "formula_seconds": round(seconds, 2),
            "peak_mb": round(seen.peak / 1e6),
            "formula_mb": round(memory / 1e6),
            "sent_mb": round(sent / 1e6),
            "sent_mb_per_s": round(seen.rate / 1e6) if n > 1 else None,
        }
        print(json.dumps(line))
        sys.stdout.flush()
        lines.append(line)
    return lines


def one_process(path: Path) -> tuple[list[Point], Any, Any]:
    """bench/scaling.py's points, as it measured and predicted them."""
    found: dict[Case, list[dict[str, Any]]] = {}
    for line in map(json.loads, path.read_text().splitlines()):
        case = Case(**{key: line[key] for key in Case.__dataclass_fields__})
        found.setdefault(case, []).append(line)
    points = [
        Point(
            case,
            {
                p: median(phase_seconds(x, p) for x in some)
                for p in ("rollout", "scoring", "update")
            },
            median(x["peak_mb"] for x in some),
        )
        for case, some in found.items()
    ]
    return points, *compare(points)


def plot(lines: list[dict[str, Any]], scaling: Path, path: Path) -> None:
    """Memory and time: measured over formula, on the diagonal where they agree."""
    figure, (memory, seconds) = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
    if scaling.exists():
        points, s, mb = one_process(scaling)
        memory.plot(mb, [p.peak_mb for p in points], ".", color="grey")
        spent = [sum(p.seconds.values()) for p in points]
        seconds.plot(s, spent, ".", color="grey", label="one process, all sizes")
    for kind in KINDS:
        some = [line for line in lines if line["kind"] == kind]
        columns = [[x[key] for x in some] for key in ("formula_mb", "peak_mb")]
        (drawn,) = memory.plot(*columns, "o", label=kind)
        columns = [[x[key] for x in some] for key in ("formula_seconds", "seconds")]
        seconds.plot(*columns, "o", color=drawn.get_color(), label=kind)
        for x in some:
            memory.annotate(str(x["processes"]), (x["formula_mb"], x["peak_mb"]), fontsize=7)
    for plane, unit in ((memory, "MB of a process"), (seconds, "CPU s a step")):
        low, high = min(plane.get_xlim()[0], plane.get_ylim()[0]), plane.get_xlim()[1]
        low = max(low, 0.1)
        plane.plot([low, high], [low, high], "-", color="lightgrey", zorder=0)
        plane.set_xscale("log")
        plane.set_yscale("log")
        plane.set_xlabel(f"{unit}, by the formula")
        plane.set_ylabel("measured")
    seconds.legend(fontsize=7)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--only-plot", action="store_true", help="what was measured before")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    # glibc keeps freed blocks of megabytes otherwise, and what is gathered seems to stay.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    kept = args.out / "processes.jsonl"
    if args.only_plot:
        lines = [json.loads(line) for line in kept.read_text().splitlines()]
    else:
        with tempfile.TemporaryDirectory() as scratch:
            write_models(Path(scratch))
            lines = lines_of(Path(scratch))
        kept.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot(lines, args.out / "scaling.jsonl", args.out / "processes.svg")
    print(f"The plot: {args.out / 'processes.svg'}")


if __name__ == "__main__":
    main()
