"""A recipe's benchmarks: checked first, asked while the policy trains and after, nothing moved."""

from __future__ import annotations

import json

import pytest

from questions import GPQA, write_jsonl
from runs import json_lines, python, srppo_command, write_recipe


@pytest.fixture
def sections(model_dir, tmp_path):
    """What makes the small run one of a model that reads and writes any text."""
    rows = [{"prompt": f"Say {n}.", "response": f"{n}!"} for n in range(24)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    return {
        "model": {"base": str(model_dir)},
        "data": {
            "demonstrations": str(tmp_path / "rows.jsonl"),
            "prompts": str(tmp_path / "rows.jsonl"),
            "max_prompt_tokens": 40,
        },
    }


def asked(data_dir, *tasks, **others):
    benchmarks = {"tasks": list(tasks), "data_dir": str(data_dir), "max_tokens": 6, **others}
    return {"prompts": None, "scorer": None, "limit": 2, "benchmarks": benchmarks}


@pytest.mark.slow
def test_all_four_after_training_with_a_comparison(sections, model_dir, with_punkt, tmp_path):
    wanted = asked(
        with_punkt, "ifeval", "gsm8k", "gpqa", "alpaca_eval", limit=3, judge=str(model_dir)
    )
    recipe = write_recipe(tmp_path, **sections, eval=wanted | {"every": None})
    done = srppo_command("run", recipe)
    assert done.code == 0, done.err
    evals = tmp_path / "run" / "evals"
    for name in ("base", "base-plain", "sft", "policy"):
        results = json.loads((evals / name / "results.json").read_text())
        assert list(results["tasks"]) == ["ifeval", "gsm8k", "gpqa", "alpaca_eval"]
        assert results["failed"] == {}
        assert name in done.out
    page = (evals / "comparison.html").read_text()
    assert "policy" in page
    assert f"Benchmarks: {evals / 'comparison.html'}" in done.out.replace("\n", "")
    question = GPQA[0]["Question"].split(",")[0]
    for path in evals.rglob("*"):
        assert not path.is_file() or question not in path.read_text(encoding="utf-8")
    asked_before = (evals / "policy" / "results.json").read_bytes()
    assert srppo_command("run", recipe).code == 0
    assert (evals / "policy" / "results.json").read_bytes() == asked_before


def test_asking_while_the_policy_trains_leaves_its_weights_byte_identical(
    sections, data_dir, tmp_path
):
    """And curves are logged at the steps asked for, of the same questions each time."""
    weights = {}
    for name, changes in {
        "silent": {"every": None, "benchmarks": {}},
        "asked": asked(data_dir, "gsm8k", "gpqa", every_limit=2) | {"every": 1},
    }.items():
        settings = {"prompts": None, "scorer": None, "limit": 2, **changes}
        recipe = write_recipe(tmp_path / name, **sections, eval=settings)
        done = srppo_command("run", recipe)
        assert done.code == 0, done.err
        weights[name] = (tmp_path / name / "run/policy/model.safetensors").read_bytes()
    assert weights["asked"] == weights["silent"]
    for line in json_lines(tmp_path / "asked/run/metrics/ppo.jsonl"):
        assert {"bench/gsm8k/flexible", "bench/gpqa/accuracy"} <= line.keys()
        assert 0 <= line["bench/gpqa/accuracy"] <= 1


@pytest.mark.slow
def test_two_processes_answer_as_one_does(sections, data_dir, model_dir, tmp_path):
    """With the weights in pieces; verdicts of a judge among the answers."""
    wanted = asked(data_dir, "gsm8k", "gpqa", "alpaca_eval", every_limit=2, judge=str(model_dir))
    settings = {"eval": wanted | {"every": 1}, "ppo": {"learning_rate": 1e-6, "steps": 1}}
    found = {}
    for name, processes, shard in (("one", 1, False), ("two", 2, True)):
        model = {**sections["model"], "shard": shard}
        recipe = write_recipe(tmp_path / name, **sections | {"model": model}, **settings)
        done = python("-m", "srppo", "run", str(recipe), "--nproc", str(processes))
        assert done.code == 0, done.err
        run = tmp_path / name / "run"
        found[name] = {
            path.relative_to(run).as_posix(): json_lines(path)
            for path in sorted(run.glob("evals/*/*/*.jsonl"))
        }
        (found[name]["curve"],) = (
            {k: v for k, v in line.items() if k.startswith("bench/")}
            for line in json_lines(run / "metrics/ppo.jsonl")
        )
        assert (run / "evals/comparison.html").is_file()
    assert {"evals/policy/responses/gsm8k.jsonl", "evals/sft/alpaca_eval/judgements.jsonl"} <= (
        found["one"].keys()
    )
    assert found["two"].keys() == found["one"].keys()
    for file, content in found["one"].items():
        assert told(found["two"][file]) == told(content, nearly), file


def nearly(number):
    """To the rounding of sums."""
    return pytest.approx(number, abs=1e-4)


def told(content, number=float):
    """Without what depends on the run directory's name."""
    if isinstance(content, dict):
        return {k: told(v, number) for k, v in content.items() if k not in ("path", "sha256")}
    if isinstance(content, list):
        return [told(v, number) for v in content]
    return number(content) if isinstance(content, float) else content


def test_what_is_missing_is_said_before_anything_is_trained(
    sections, data_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("nltk.data.path", [])
    recipe = write_recipe(tmp_path, **sections, eval=asked(data_dir, "ifeval") | {"every": None})
    done = srppo_command("run", recipe)
    assert done.code == 2
    assert "nltk's punkt_tab is not there" in done.err
    assert not (tmp_path / "run" / "sft").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": ["alpaca_eval"]}, "there is no judge"),
        ({"tasks": ["gsm8k"], "judge_url": "http://x"}, "who would judge is not clear"),
        ({"tasks": ["gsm8k"], "every_limit": 4}, "without eval.every"),
        ({"tasks": ["mmlu"]}, "eval.benchmarks.tasks.0='mmlu'"),
    ],
)
def test_settings_that_are_refused(changes, words, tmp_path):
    recipe = write_recipe(tmp_path, eval={"every": None, "benchmarks": changes})
    done = srppo_command("run", recipe)
    assert done.code == 2
    assert words in done.err
