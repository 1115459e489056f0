"""The commands of docs/evaluation.md and docs/alpaca.md, on small questions of our own."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

import alpaca
from questions import GSM8K, IFEVAL, write_jsonl
from runs import srppo_command
from srppo.models.load import load_model, load_tokenizer

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str, kind: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[str]:
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    assert all(x.startswith(("srppo eval ", "pip install ", "export ")) for x in lines)
    return [line for line in lines if line.startswith("srppo ")]


@pytest.fixture
def place(tmp_path, chat_dir, monkeypatch) -> Path:
    """Where the reader is: a finished run with a template, files of responses, a key."""
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/run.json").write_text("{}")
    (tmp_path / "runs/mine/policy").symlink_to(chat_dir)
    said = [{"prompt": row["prompt"], "response": "heron, heron."} for row in IFEVAL]
    write_jsonl(tmp_path / "mine.jsonl", said)
    answers = [{"prompt": question, "response": "#### 18"} for question, _ in GSM8K]
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    (tmp_path / "annotations.json").write_text(json.dumps(alpaca.annotations(4)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    return tmp_path


def run(line: str, names: dict[str, str]) -> None:
    for name, value in names.items():
        line = re.sub(rf"\b{name}\b", value, line)
    done = srppo_command(*shlex.split(line, comments=True)[1:])
    assert done.code == 0, f"{line}\n{done.out}\n{done.err}"


def test_the_commands_of_evaluation(place, with_punkt, model_dir):
    (place / "data").symlink_to(with_punkt)
    for line in commands("evaluation.md"):
        line = line.split("#")[0]
        if "--data-dir" not in line:  # the page means the hub's
            line += " --data-dir data"
        if "--preset" in line:  # instead of the line before, which took the directory
            line += " --out quick"
        if "doctor" not in line and "--responses" not in line:
            line += " --max-tokens 6"
        run(line, {"MODEL": str(model_dir)})
    assert (place / "evals" / "base" / "results.json").is_file()
    assert (place / "evals" / "sft" / "results.json").is_file()
    for out, code in (("evals", 2), ("alike", 0)):  # the base has no template
        assert srppo_command("compare", f"base={out}/base", f"srppo={out}/srppo").code == code


def test_the_script_of_evaluation(place, with_punkt, model_dir, capsys):
    (place / "data").symlink_to(with_punkt)
    (code,) = blocks("evaluation.md", "python")
    names = {"Path": Path, "model": load_model(str(model_dir)), "print": print}
    names["tokenizer"] = load_tokenizer(str(model_dir))
    exec(
        code.replace("limit=64", "limit=2, max_tokens=6")
        + "print(benchmarks.measure(model, tokenizer))",
        names,
    )
    assert "bench/gsm8k/flexible" in capsys.readouterr().out


def test_the_commands_of_alpaca(place, model_dir):
    alpaca.data_dir(place / "data", 4)
    lines = commands("alpaca.md")
    assert len(lines) == 4
    with alpaca.JudgeServer() as server:
        for k, line in enumerate(lines):
            line = re.sub(r"--judge-url \S+", f"--judge-url {server.url}", line)
            if "--responses" not in line:
                line += f" --max-tokens 6 --data-dir data --out out{k}"
            run(line, {"MODEL": str(model_dir), "JUDGE_DIR": str(model_dir), "NAME": "judge"})
