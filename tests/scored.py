"""Result directories of benchmarks, as `srppo eval` writes them, from given or random scores."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

KINDS = {
    "ifeval": {"prompt_strict": "proportion", "inst_strict": "clustered"},
    "gsm8k": {"flexible": "proportion", "strict": "proportion"},
    "gpqa": {"accuracy": "proportion"},
    "alpaca_eval": {"length_controlled_win_rate": "reference", "win_rate": "mean"},
}
"""Metrics and their kinds; the first is the headline."""

Scores = dict[str, dict[str, list[Any]]]  # task -> metric -> one score a question


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def random_scores(seed: int, skill: float, n: int, tasks: Iterable[str] = KINDS) -> Scores:
    """Of a model; question i is as hard for every model, and has as many instructions."""
    rng = random.Random(seed)

    def right(i: int) -> int:
        return int(rng.gauss(skill, 0.25) > random.Random(i).random())

    several = [[right(i) for _ in range(1 + i % 3)] for i in range(n)]
    made: Scores = {
        "ifeval": {"prompt_strict": [int(all(s)) for s in several], "inst_strict": several},
        "gsm8k": {metric: [right(i) for i in range(n)] for metric in KINDS["gsm8k"]},
        "gpqa": {"accuracy": [right(i) for i in range(n)]},
        "alpaca_eval": {"win_rate": [rng.betavariate(skill, 1 - skill) for _ in range(n)]},
    }
    return {task: made[task] for task in tasks}


def write(directory: Path, scores: Scores, **changes: Any) -> Path:
    """A result directory; `changes` are keys of every task, as template="plain"."""
    (directory / "samples").mkdir(parents=True, exist_ok=True)
    tasks = {}
    for task, metrics in scores.items():
        n = len(next(iter(metrics.values())))
        lines = []
        for i in range(n):
            secret = task == "gpqa"  # its questions are never written out
            prompt, response = f"{task} question {i}\u2028?", f"answer {i}"
            lines.append(
                {
                    "doc_id": i,
                    "prompt_sha256": sha256(prompt),
                    **({} if secret else {"prompt": prompt, "response": response}),
                    "length": 10 + i % 7,
                    "ended": i % 11 != 0,
                    "scores": {metric: values[i] for metric, values in metrics.items()},
                }
            )
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (directory / "samples" / f"{task}.jsonl").write_text(text, encoding="utf-8")
        measured = {m: estimate(KINDS[task][m], values) for m, values in metrics.items()}
        if task == "alpaca_eval":
            value = measured["win_rate"]["value"]
            controlled = {**estimate("mean", metrics["win_rate"]), "kind": "reference"}
            measured = {"length_controlled_win_rate": {**controlled, "value": value}, **measured}
        tasks[task] = {
            "version": 4,
            "n": n,
            "headline": next(iter(KINDS[task])),
            "metrics": measured,
            "template": "chat",
            "template_sha256": sha256("template"),
            "data_sha256": sha256(task),
            "prompts_sha256": sha256("".join(line["prompt_sha256"] for line in lines)),
            "mean_length": sum(line["length"] for line in lines) / n,
            "eos_rate": sum(line["ended"] for line in lines) / n,
            "truncated_responses": sum(not line["ended"] for line in lines),
            "truncated_prompts": 0,
            "empty": 0,
            "settings": {"max_gen_toks": 512, "num_fewshot": 0},
            "notes": [],
            **changes,
        }
    results = {
        "schema": 1,
        "model": {"name": directory.name, "path": f"models/{directory.name}", "sha256": None},
        "created": "2025-11-23T20:00:00+00:00",
        "seed": 0,
        "config": {},
        "packages": {"lm_eval": "0.4.13"},
        "tasks": tasks,
        "failed": {},
    }
    (directory / "results.json").write_text(json.dumps(results, indent=2))
    return directory


def change(directory: Path, task: str | None = None, **values: Any) -> Path:
    """Sets keys of results.json, or of a task in it."""
    path = directory / "results.json"
    tree = json.loads(path.read_text())
    (tree if task is None else tree["tasks"][task]).update(values)
    path.write_text(json.dumps(tree))
    return directory


def estimate(kind: str, values: list[Any]) -> dict[str, Any]:
    """Value with a rough interval: what a comparison takes over as it is."""
    flat = [x for v in values for x in (v if isinstance(v, list) else [v])]
    value = math.fsum(flat) / len(flat)
    stderr = math.sqrt(math.fsum((x - value) ** 2 for x in flat) / len(flat) / len(values))
    low, high = value - 2 * stderr, value + 2 * stderr
    return {
        "value": value, "stderr": stderr, "low": low, "high": high, "n": len(values), "kind": kind,
    }  # fmt: skip


def demo(parent: Path, n: int = 200) -> Path:
    """base, sft and srppo, each better than the one before, on all four benchmarks."""
    for seed, (name, skill) in enumerate({"base": 0.35, "sft": 0.5, "srppo": 0.62}.items()):
        write(parent / name, random_scores(seed, skill, n))
    return parent
