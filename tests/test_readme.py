"""Every command of the README runs: here with tiny settings, or in CI as it stands."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from warm import warm_srppo

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
SMALL = [
    "controls=null",
    "data.demonstrations_limit=24",
    "data.held_out=8",
    "data.prompts_limit=16",
    "ppo.steps=2",
    "ppo.rollouts_per_step=8",
    "ppo.minibatch_size=8",
    "eval.limit=12",
    "eval.every=null",
    "audit.prompts=8",
]


@pytest.fixture(scope="module")
def srppo(tmp_path_factory):
    """The command, with text to read; what it prints."""
    folder = tmp_path_factory.mktemp("bin")

    def run(*arguments: str, stdin: str = "") -> str:
        done = subprocess.run(
            [str(folder / "srppo"), *arguments],
            cwd=ROOT, input=stdin, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    with warm_srppo(folder):
        yield run


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """In an interpreter of its own, as a reader's."""
    run_dir = tmp_path_factory.mktemp("runs") / "miniature"
    command = [sys.executable, "-m", "srppo", "run", "recipes/miniature.yaml"]
    command += [f"output_dir={run_dir}", *SMALL]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return run_dir


def test_ci_runs_the_make_targets_of_the_readme():
    targets = {line.split()[1] for line in COMMANDS if line.startswith("make ")}
    ci = (ROOT / ".ci" / "run").read_text() + (ROOT / "Makefile").read_text()
    assert {"demo", "test"} <= targets
    for target in targets:
        if target == "check":  # CI runs its three parts one by one
            assert "check: lint test slow" in ci
            target = "slow"
        assert f"make {target}" in ci


def test_every_command_is_known():
    for line in COMMANDS:
        assert line.startswith(("make ", "srppo ")), f"untested README command: {line}"
        if line.startswith("srppo "):
            assert line in KNOWN, f"untested README command: {line}"


KNOWN = ["srppo run recipes/laptop.yaml model.base=MODEL data.demonstrations=FILE.jsonl"]


def test_own_model_and_data(tmp_path, srppo):
    data = tmp_path / "mine.jsonl"
    rows = [f'{{"prompt": "copy : {a} {b}", "response": "{a} {b}"}}' for a in "abc" for b in "def"]
    data.write_text("\n".join([*rows, '{"prompt": "no response"}']))
    line = KNOWN[0].replace("MODEL", "srppo:miniature").replace("FILE.jsonl", str(data))
    out = srppo(
        *shlex.split(line)[1:],
        f"output_dir={tmp_path / 'run'}",
        *SMALL,
        "data.max_prompt_tokens=20",
        "data.max_response_tokens=10",
    )
    assert "report.html" in out
    assert (tmp_path / "run" / "policy" / "model.safetensors").is_file()


@pytest.mark.parametrize("command", ["run", "sft", "audit", "ppo"])
def test_the_commands_of_the_table_accept_a_recipe(command, finished, srppo):
    srppo(command, "recipes/miniature.yaml", f"output_dir={finished}", *SMALL)


def test_report_and_summary(finished, srppo):
    assert "report.html" in srppo("report", str(finished))
    assert "| policy | T=1 |" in srppo("summary", str(finished))
    table = re.findall(r"^\| `srppo (\w+)", README, re.MULTILINE)
    assert table == [
        *(
            "run",
            "run",
            "run",
            "sweep",
            "reproduce",
            "sft",
            "audit",
            "ppo",
            "data",
            "eval",
            "eval",
            "eval",
        ),
        *("report", "summary", "compare", "chat", "export", "push", "serve"),
    ]


def test_chat_and_export(finished, tmp_path, srppo):
    said = srppo(
        "chat", str(finished), "--compare", f"sft={finished / 'sft'}", stdin="copy : a b\n"
    )
    assert [line.split(":")[0] for line in said.splitlines()] == [finished.name, "sft"]
    srppo("export", str(finished), str(tmp_path / "out"))
    assert (tmp_path / "out" / "README.md").is_file()


def test_the_python_of_the_readme(finished, monkeypatch):
    (code,) = [text for kind, text in BLOCKS if kind == "python"]
    settings = [f"output_dir={finished}", *SMALL]
    small = ", ".join(repr(s) for s in settings)
    assert '"ppo.kl_coef=0.5"' in code
    monkeypatch.chdir(ROOT)
    exec(code.replace('"ppo.kl_coef=0.5"', small), {})
