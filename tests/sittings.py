"""Runs that are cut off and go on: a recipe with every kind of training, what has to be equal."""

from __future__ import annotations

from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from runs import timeless

SETTINGS = {
    "sft": {"optimizer": "adamw", "learning_rate": 1e-3, "lr_schedule": "cosine", "epochs": 2},
    "ppo": {"steps": 3, "lr_schedule": "linear", "value_warmup_steps": 1, "epochs": 2},
    "checkpoint": {"every": 1, "keep_finished": True, "keep_best": "eval/accuracy/in_domain"},
    "controls": {"rloo": {"ppo": {"estimator": "rloo", "responses_per_prompt": 2, "steps": 2}}},
}
"""For `write_recipe`: four steps of stage 1, four of stage 2, two of the control. Checkpoints of
finished stages are kept, so that they can be compared."""
LORA = {"model": {"lora": {"rank": 4, "dropout": 0.3}}, **SETTINGS}
"""Dropout draws from the process's own generator; roles share one copy of the weights."""


def stages_of(run: Path) -> list[str]:
    """What was trained."""
    return ["sft", "ppo", *(f"controls/{p.name}" for p in (run / "controls").iterdir())]


def result_of(run: Path) -> dict[str, Any]:
    """All that has to be equal, by name: weights, both optimizers' states, the critic, the log, the
    evaluation."""
    found: dict[str, Any] = {}
    stages = stages_of(run)
    for name in ("policy", "best/policy", *(s for s in stages if s != "ppo")):
        (path,) = [p for p in (run / name).iterdir() if p.suffix == ".safetensors"]
        found[name] = path.read_bytes()
    for stage in stages:
        newest = max((run / "checkpoints" / stage).iterdir())
        for name in ("tensors.safetensors", "state.json"):
            found[f"{stage}/{newest.name}/{name}"] = (newest / name).read_bytes()
        found[f"metrics/{stage}"] = timeless(run / "metrics" / f"{stage}.jsonl")
    for name in ("audit.json", "results.json", "samples.jsonl"):
        found[name] = (run / name).read_bytes()
    return found


def differences(run: Path, expected: dict[str, Any]) -> list[str]:
    """Names of what is not as expected."""
    try:
        found = result_of(run)
    except FileNotFoundError as e:
        return [f"{e.filename} is not there"]
    return sorted(k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k))


def at_call(patch: Any, target: str, number: int, do: Any) -> None:
    """`do()` when a function is called for the number-th time, before it does anything."""
    real, count = resolve_name(target), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            do()
        return real(*args, **kwargs)

    patch.setattr(target, counted)


def only_what_is_compared(patch: Any) -> None:
    """Not the page, which is made of it, and no timing of the machine: most of the time here."""
    patch.setattr("srppo.pipeline.Run.report", lambda self: None)
    patch.setattr("srppo.train.pace.matmul_rate", lambda device: 1e9)
