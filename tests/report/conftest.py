"""A run directory as the other rooms write it, with numbers of a plausible run."""

import json
import math
import random
from pathlib import Path

import pytest

from srppo.report import build

GROUPS = ["in_domain", "out_of_domain", "unseen"]
ACCURACY = {
    ("base", "T=1"): (0.049, 0.006, 0.006),
    ("base", "greedy"): (0.0, 0.0, 0.0),
    ("sft", "T=1"): (0.287, 0.044, 0.047),
    ("sft", "greedy"): (0.898, 0.0, 0.0),
    ("sft extended", "T=1"): (0.922, 0.702, 0.513),
    ("sft extended", "greedy"): (0.988, 0.958, 0.785),
    ("policy", "T=1"): (0.875, 0.856, 0.619),
    ("policy", "greedy"): (0.919, 0.931, 1.0),
}
HOSTILE = [
    "<script>alert(1)</script>",
    "</svg>",
    "</style><img src=x onerror=alert(2)>",
    "{{ 7*7 }}",
]


def write_run(run_dir: Path) -> Path:
    (run_dir / "metrics").mkdir(parents=True)
    rng = random.Random(0)
    files = {"run": _run(), "data": _data(), "audit": _audit(rng), "results": _results()}
    for name, content in files.items():
        (run_dir / f"{name}.json").write_text(json.dumps(content))
    _jsonl(run_dir / "metrics" / "sft.jsonl", _sft(rng))
    _jsonl(run_dir / "metrics" / "ppo.jsonl", _ppo(rng))
    _jsonl(run_dir / "samples.jsonl", _samples(rng))
    return run_dir


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path / "demo")


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the whole run, built once; not to be changed."""
    return build(write_run(tmp_path_factory.mktemp("whole") / "demo"))


def _jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _run() -> dict:
    return {
        "name": "miniature",
        "recipe": {
            "name": "miniature",
            "model": {"base": "runs/demo/base", "dtype": "float32"},
            "data": {"demonstrations": "demonstrations.jsonl", "max_response_tokens": 24},
            "sft": {"epochs": 2, "learning_rate": 0.003, "optimizer": "sgd", "stop": None},
            "ppo": {"kl_coef": 0.2, "clip": 0.2, "steps": 30, "credit": "eos", "whiten": True},
            "eval": {"groups": GROUPS, "decodings": ["T=1", "greedy"]},
        },
        "recipe_source": "recipes/miniature.yaml",
        "command": "srppo run recipes/miniature.yaml ppo.kl_coef=0.2 --out runs/demo",
        "srppo_version": "0.1.0",
        "commit": "c867b78f0c2f4f3b9a1d5b6e7c8d9e0f1a2b3c4d",
        "versions": {
            "python": "3.11.9",
            "torch": "2.9.1",
            "transformers": "5.23.0",
            "trl": "1.16.0",
        },
        "hardware": {
            "platform": "Linux x86_64",
            "processor": "AMD EPYC 7B13",
            "cores": 8,
            "threads": 4,
            "memory_gib": 31.3,
            "gpu": None,
        },
        "seed": 0,
        "started": "2026-01-12T09:30:12+00:00",
        "finished": "2026-01-12T09:33:40+00:00",
        "stages": {
            "sft": {"seconds": 12.3, "status": "done"},
            "audit": {"seconds": 6.1, "status": "done"},
            "ppo": {"seconds": 148.9, "status": "done"},
            "eval": {"seconds": 40.2, "status": "done"},
        },
        "models": {"base": "runs/demo/base", "sft": "runs/demo/sft"},
    }


def _data() -> dict:
    lengths = {"min": 5, "median": 7, "mean": 7.4, "max": 19}
    one = {"rows": 200, "used": 197, "dropped": {"prompt too long": 2, "empty response": 1}}
    return {
        "demonstrations": {
            **one,
            "source": "demonstrations.jsonl",
            "length": lengths,
            "truncated": 0,
        },
        "prompts": {"source": "prompts.jsonl", "rows": 400, "used": 400, "dropped": {}},
        "overlap": {"exact": 12, "of": 400},
    }


def _sft(rng: random.Random) -> list[dict]:
    return [
        {"step": i, "epoch": i / 7, "loss": 0.2 + 0.9 * math.exp(-i / 4) + rng.gauss(0, 0.02)}
        for i in range(1, 15)
    ]


def _ppo(rng: random.Random) -> list[dict]:
    rows = []
    for step in range(1, 31):
        rise = 1 - math.exp(-step / 8)
        row = {
            "step": step,
            "reward": 0.59 + 1.28 * rise + rng.gauss(0, 0.03),
            "reward_std": 1.0 - 0.65 * rise,
            "objective": 0.59 + 0.85 * rise + rng.gauss(0, 0.03),
            "kl_sft": 2.3 * rise + abs(rng.gauss(0, 0.03)),
            "kl_base": 0.6 + 3.1 * rise + rng.gauss(0, 0.05),
            "response_length": 7.6 - 0.3 * rise + rng.gauss(0, 0.08),
            "eos_rate": min(1.0, 0.88 + 0.12 * rise),
            "entropy": 0.9 - 0.5 * rise + rng.gauss(0, 0.01),
            "value_explained_variance": math.nan if step == 1 else 0.8 * rise - 3 / step**2,
            "clip_fraction": 0.01 + 0.004 * rng.random(),
            "grad_norm": 1.2 + 0.3 * rng.random(),
            "length_reward_corr": -0.2 + 0.1 * rng.random(),
            "sampler_logprob_diff": 2e-7,
            "time/rollout": 2.9,
            "time/scoring": 0.6,
            "time/update": 1.4,
            "time/tokens_per_second": 812.0,
        }
        if step % 5 == 0:
            for group, start, end in zip(
                GROUPS, (0.29, 0.04, 0.05), (0.88, 0.86, 0.62), strict=True
            ):
                row[f"eval/accuracy/{group}"] = start + (end - start) * rise
        rows.append(row)
    return rows


def _audit(rng: random.Random) -> dict:
    reward = {}
    for name, mean, std in (("demonstrations", 1.6, 0.5), ("sft", 0.9, 1.0), ("base", -0.8, 1.2)):
        edges = [-4.5 + 0.25 * i for i in range(33)]
        counts = [0] * 32
        drawn = sorted(rng.gauss(mean, std) for _ in range(240))
        for value in drawn:
            counts[min(31, max(0, int((value + 4.5) / 0.25)))] += 1
        quantiles = {str(q): drawn[int(2.39 * q)] for q in (5, 25, 50, 75, 95)}
        histogram = {"edges": edges, "counts": counts}
        reward[name] = {"mean": mean, "std": std, "quantiles": quantiles, "histogram": histogram}
    return {
        "prompts": 240,
        "reward": reward,
        "separation": {"sft_vs_base_auc": 0.86, "demonstrations_vs_base_auc": 0.95},
        "length_corr": {"sft": -0.12, "base": -0.58},
        "top_tokens": [
            {
                "token": token,
                "id": i,
                "count": 240 - 31 * i,
                "mean": 1.2 - 0.4 * i,
                "share": 0.34 / (i + 1),
            }
            for i, token in enumerate(["<eos>", " answer", "\n", " um", HOSTILE[0]])
        ],
        "curve": {
            "lams": [0, 1, 2, 3, 4, 6, 8],
            "nll": [3.07, 1.39, 0.60, 0.32, 0.27, 0.36, 0.54],
            "lam_star": 4,
            "lam_recipe": 6,
            "nll_sft": 1.39,
            "nll_recipe": 0.36,
        },
        "warnings": [
            "The recipe's λ = 6 lies past λ* = 4: kl_coef 0.33 would follow the held-out optimum.",
            "Base responses reach the length limit in 21 % of the cases.",
        ],
    }


def _results() -> dict:
    rows = []
    for (model, decoding), accuracy in ACCURACY.items():
        for group, share in zip(GROUPS, accuracy, strict=True):
            done = 0.78 if model == "base" else 0.88 if model == "sft" else 0.99
            rows.append(
                {
                    "model": model,
                    "decoding": decoding,
                    "group": group,
                    "n": 480,
                    "scores": {"accuracy": share, "format": min(1.0, share + 0.08)},
                    "response_length": 7.3 if model == "policy" else 7.9,
                    "eos_rate": done,
                    "reward": {"base": -0.8, "sft": 0.6, "policy": 1.87}.get(model, 1.1),
                }
            )
    nll = {"base": 3.07, "sft": 1.39, "policy": 0.41}
    return {"groups": GROUPS, "rows": rows, "primary": "accuracy", "held_out_nll": nll}


def _samples(rng: random.Random) -> list[dict]:
    texts = {
        "base": [
            " um",
            " i",
            " think",
            " maybe",
            " b",
            " a",
            " c",
            " ?",
            "\n",
            " next",
            " :",
            " f",
        ],
        "sft": [" answer", " :", " [", " c", " a", " b", " ]", "<eos>"],
        "policy": [" answer", " :", " [", " c", " b", " a", " ]", "<eos>"],
    }
    prompts = ["reverse : a b c\n", "what is copy f e d a ?\n", "sort : d b a c\n"]
    rows = []
    for prompt, group in zip(prompts, GROUPS, strict=True):
        responses = {}
        for model, tokens in texts.items():
            centre = -0.4 if model == "base" else 0.4
            drawn = [{"text": t, "log_ratio": rng.gauss(centre, 0.6)} for t in tokens]
            responses[model] = {
                "tokens": drawn,
                "reward": sum(token["log_ratio"] for token in drawn),
                "truncated": model == "base",
                "scores": {"accuracy": float(model == "policy"), "format": float(model != "base")},
            }
        rows.append({"prompt": prompt, "group": group, "responses": responses})
    hostile = [
        {"text": text, "log_ratio": 1.9} for text in [*HOSTILE, "", "\x00", "\ud800", "名前"]
    ]
    response = {"tokens": hostile, "reward": 15.2, "truncated": False, "scores": {}}
    rows.append({"prompt": HOSTILE[0], "group": HOSTILE[2], "responses": {"sft": response}})
    return rows
