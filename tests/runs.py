"""Runs of the packaged miniature, small enough for a test, and the command line around them."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

import srppo.cli

SMALL = {
    "name": "small",
    "seed": 3,
    "model": {"base": "srppo:miniature"},
    "data": {
        "demonstrations": "python:srppo.miniature.world:demonstrations",
        "demonstrations_limit": 16,
        "held_out": 8,
        "prompts": "python:srppo.miniature.world:prompts",
        "prompts_limit": 16,
        "max_prompt_tokens": 24,
        "max_response_tokens": 12,
    },
    "sft": {
        "optimizer": "sgd",
        "learning_rate": 0.01,
        "batch_size": 8,
        "micro_batch_size": 8,
        "epochs": 1,
    },
    "ppo": {
        "kl_coef": 0.5,
        "steps": 2,
        "rollouts_per_step": 8,
        "minibatch_size": 4,
        "learning_rate": 1e-3,
    },
    "eval": {
        "prompts": "python:srppo.miniature.world:evaluation",
        "limit": 24,
        "scorer": "python:srppo.miniature.world:score",
        "temperatures": [0.0, 1.0],
        "every": 1,
        "every_limit": 6,
        "side_by_side": 3,
    },
}
"""About a second, once everything is imported."""


def write_recipe(folder: Path, **sections: Any) -> Path:
    """SMALL as a file, with runs in `folder`/run; given sections are merged into its own."""
    tree: dict[str, Any] = {"output_dir": str(folder / "run"), **SMALL}
    for name, content in sections.items():
        old = tree.get(name)
        tree[name] = {**old, **content} if isinstance(old, dict) else content
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


def srppo_command(*arguments: object) -> Done:
    """`srppo ...` in this process. What the command line does not catch reaches the test."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["srppo", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            srppo.cli.main()
            code = 0
        except SystemExit as e:
            code = int(e.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(path: Path) -> list[dict[str, Any]]:
    """A metrics file without what the clock says."""
    return [
        {k: v for k, v in line.items() if not k.startswith("time/")} for line in json_lines(path)
    ]


def python(*arguments: str) -> Done:
    """A Python process of its own."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


def grow(disk: Path) -> None:
    """Free space on a `small_disk`."""
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
