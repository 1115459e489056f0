"""Where a run comes from: what, beside the recipe, is needed to repeat it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from srppo import distributed
from srppo.config import Recipe


def provenance(recipe: Recipe, source: str) -> dict[str, Any]:
    """The head of run.json: command, versions, commit, hardware, seed, models."""
    packages = (
        "srppo",
        "torch",
        "transformers",
        "peft",
        "trl",
        "datasets",
        "accelerate",
        "tokenizers",
    )
    return {
        "recipe_source": source,
        "command": " ".join(["srppo", *sys.argv[1:]]),
        "srppo_version": _version("srppo"),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in packages}},
        "hardware": {
            "platform": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "processes": distributed.size(),
            "memory_gib": round(
                os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1
            ),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "seed": recipe.seed,
        "models": {"base": recipe.model.base, "sft": recipe.model.sft},
        "started": now(),
        "finished": None,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of a source checkout; None for an installed package."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
