"""The examples run and reach what their first lines promise."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from srppo.models.load import load_model, load_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"

TINY = (
    "data.demonstrations_limit=16",
    "data.held_out=8",
    "sft.batch_size=8",
    "sft.micro_batch_size=8",
    "ppo.steps=2",
    "ppo.rollouts_per_step=16",
    "eval.limit=12",
    "eval.every=null",
    "eval.temperatures=[0.0, 1.0]",
    "eval.samples_per_prompt=1",
)
"""Settings under which the whole method takes seconds on the miniature."""


def test_the_loop_runs_as_a_script_and_closes_the_gap(tmp_path):
    """By itself, in another directory, on one thread: more than 95% of J* - J(sft)."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "loop.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    first, *lines = done.stdout.splitlines()
    j_sft, j_star = map(float, re.findall(r"J\S* ([\d.]+)", first))
    steps = [int(re.match(r"step +(\d+)", line)[1]) for line in lines]
    js = [float(re.search(r"J ([\d.]+)", line)[1]) for line in lines]
    closed = [float(re.search(r"closed ([\d.]+)%", line)[1]) for line in lines]

    assert steps == [20, 40, 60]
    assert j_sft < js[0] <= js[-1] <= j_star
    assert closed[-1] > 95
    assert closed[-1] == pytest.approx(100 * (js[-1] - j_sft) / (j_star - j_sft), abs=0.2)


def test_the_loop_can_be_read_in_one_sitting():
    assert len((EXAMPLES / "loop.py").read_text().splitlines()) < 150


def test_the_api_example_runs_every_stage_wherever_it_is_called(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    page = runpy.run_path(str(EXAMPLES / "api.py"))["main"](f"output_dir={out}", *TINY)

    assert page == out / "report.html"
    assert page.read_text().startswith("<!doctype html>")
    assert (out / "sft" / "model.safetensors").is_file()
    assert (out / "policy" / "model.safetensors").is_file()
    assert len((out / "metrics" / "ppo.jsonl").read_text().splitlines()) == 2
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert {row["model"] for row in rows} == {"base", "sft", "policy"}
    printed = capsys.readouterr().out
    assert str(out / "policy") in printed
    assert all(row["group"] in printed for row in rows)


def test_trl_trains_with_the_coherent_reward(tmp_path, capsys):
    """Two steps, from a model a little away from the packaged one."""
    sft = load_model("srppo:miniature")
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in sft.parameters():
            weight += 0.02 * torch.randn_like(weight)
    sft.save_pretrained(tmp_path / "sft")
    load_tokenizer("srppo:miniature").save_pretrained(tmp_path / "sft")
    main = runpy.run_path(str(EXAMPLES / "trl_rloo.py"))["main"]
    policy = main(
        "srppo:miniature", str(tmp_path / "sft"), str(tmp_path / "out"),
        per_device_train_batch_size=16, max_steps=2, logging_steps=1, disable_tqdm=True,
    )  # fmt: skip

    assert "rewards/coherent/mean" in capsys.readouterr().out
    trained, start = load_model(str(policy)), load_model(str(tmp_path / "sft"))
    moved = [
        not torch.equal(a, b) for a, b in zip(trained.parameters(), start.parameters(), strict=True)
    ]
    assert any(moved)
