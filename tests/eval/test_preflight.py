"""What would fail after an hour fails in the first second, all of it at once, with the cure."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import nltk
import pytest
from huggingface_hub import constants

import tiny
from questions import write_jsonl
from runs import srppo_command
from srppo.errors import ConfigError
from srppo.eval import preflight
from srppo.eval.preflight import Settings, prepare

NO_TEMPLATE = "{{ raise_exception('no questions, please') }}"


@pytest.fixture
def no_punkt(monkeypatch):
    """A machine without nltk's data, and offline."""
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def no_model(monkeypatch):
    """Nothing may be loaded."""
    monkeypatch.setattr("srppo.eval.subjects.load_model", None)


def test_everything_at_once_and_nothing_is_loaded(
    no_punkt, no_model, data_dir, model_dir, tmp_path, monkeypatch
):
    mine = tmp_path / "data"
    shutil.copytree(data_dir / "ifeval", mine / "ifeval")
    write_jsonl(mine / "gsm8k_test.jsonl", [{"question": "?"}])
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine.txt").write_text("")
    done = srppo_command(
        "eval", f"m={model_dir}", "x=/nowhere/at/all", "--tasks", "ifeval,gsm8k,alpaca_eval",
        "--data-dir", mine, "--out", tmp_path,
    )  # fmt: skip
    assert done.code == 2
    assert "Traceback" not in done.err
    for words in (
        "found before anything was loaded",
        "punkt_tab is not there",
        "python -m nltk.downloader punkt_tab",
        "row 1 has no 'answer'",
        "alpaca_eval without a judge",
        "'/nowhere/at/all' does not exist",
        "files that are no evaluation of srppo",
    ):
        assert words in done.err, done.err
    assert not (tmp_path / "m" / "results.json").exists()


@pytest.mark.slow
def test_offline_without_nltk_data_is_an_error_not_a_crash(data_dir, model_dir, tmp_path):
    """In a process of its own, as a user meets it."""
    done = subprocess.run(
        [
            sys.executable, "-m", "srppo", "eval", str(model_dir), "--data-dir", str(data_dir),
            "--tasks", "ifeval,gpqa", "--out", str(tmp_path / "out"),
        ],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "NLTK_DATA": str(tmp_path), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n  1. ") == 1
    assert "punkt_tab is not there" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_gated_questions_that_are_not_there(no_model, model_dir, tmp_path, monkeypatch):
    import datasets

    def refuse(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("gated dataset on the Hub. Log in.")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    plan = prepare([str(model_dir)], Settings(("gpqa",), data_dir=tmp_path))
    (problem,) = plan.problems
    for words in ("accept the conditions at", "Idavidrein/gpqa", "`hf auth login`", "gated"):
        assert words in problem.says
    with pytest.raises(ConfigError, match=r"1 problem"):
        plan.require()


def test_packages_that_are_not_installed(data_dir, monkeypatch):
    there = preflight.find_spec
    monkeypatch.setattr(
        preflight, "find_spec", lambda name: None if name == "langdetect" else there(name)
    )
    plan = prepare([], Settings(("ifeval", "gpqa"), data_dir=data_dir))
    (problem,) = plan.problems
    assert "langdetect is not installed" in problem.says
    assert "pip install 'srppo[eval]'" in problem.says
    assert list(plan.tasks) == ["gpqa"]


def damaged(folder, damage):
    directory = tiny.copy_of_miniature(folder / "model")
    damage(directory)
    return directory


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda d: (d / "model.safetensors").unlink(), "holds no weights"),
        (lambda d: (d / "tokenizer.json").write_text("{"), "tokenizer of"),
        (lambda d: (d / "config.json").write_text("{"), "is not a valid JSON file"),
        (lambda d: (d / "chat_template.jinja").write_text(NO_TEMPLATE), "refuses a question"),
    ],
)
def test_models_that_cannot_be_asked(no_model, data_dir, tmp_path, damage, says):
    model = damaged(tmp_path, damage)
    plan = prepare([str(model)], Settings(("gsm8k",), data_dir=data_dir))
    (problem,) = plan.problems
    assert says in problem.says


def test_a_template_from_a_file(data_dir, model_dir, tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    plan = prepare(
        [str(model_dir)], Settings(("gsm8k",), data_dir=data_dir, chat_template=str(path))
    )
    (subject,) = plan.subjects
    assert subject.template == "chat"
    assert prepare([], Settings(("gsm8k",), data_dir=data_dir)).problems == []
    plan = prepare([str(model_dir)], Settings(("gsm8k",), chat_template="none", data_dir=data_dir))
    assert plan.subjects[0].template == "plain"
    wrong = Settings(("gsm8k",), data_dir=data_dir, chat_template="nowhere.jinja")
    assert "cannot be read" in prepare([str(model_dir)], wrong).problems[0].says


@pytest.mark.parametrize(
    ("models", "says"),
    [
        (["a/m", "b/m"], "two models are called 'm'"),
        (["x=a", "x=b"], "first=a second=b"),
        (["..=a"], "is no name"),
        (["base=a", "base-plain=b"], "overwrite each other"),
    ],
)
def test_names_that_cannot_be(no_model, data_dir, models, says):
    plan = prepare(models, Settings(("gpqa",), data_dir=data_dir))
    assert says in plan.problems[0].says


@pytest.mark.parametrize(
    ("tasks", "says"), [("ifeval,nonsense", "'nonsense' is not known"), ("gpqa,gpqa", "once")]
)
def test_tasks_that_cannot_be(tasks, says):
    done = srppo_command("eval", "m", "--tasks", tasks)
    assert done.code == 2
    assert says in done.err


@pytest.mark.parametrize("flags", [["--judge-url", "http://x"], ["--judge-model", "m"]])
def test_half_a_judge(flags):
    done = srppo_command("eval", "m", *flags)
    assert done.code == 2
    assert "--judge-url with --judge-model" in done.err


# --- doctor --------------------------------------------------------------------------------------


def test_the_doctor_says_what_is_there(no_model, data_dir, model_dir):
    done = srppo_command(
        "eval", "doctor", model_dir, "--tasks", "gsm8k,gpqa", "--data-dir", data_dir
    )
    assert done.code == 0, done.err
    assert "PROBLEM" not in done.out
    assert "4 of" in done.out
    assert "2048 positions" in done.out
    assert "prompts fit" in done.out


def test_the_doctor_says_what_is_missing(no_punkt, tmp_path, data_dir):
    mine = tmp_path / "data"
    shutil.copytree(data_dir / "ifeval", mine / "ifeval")
    done = srppo_command("eval", "doctor", "--tasks", "ifeval", "--data-dir", mine)
    assert done.code == 2
    assert "PROBLEM" in done.out
    assert "punkt_tab" in done.out


def test_the_doctor_needs_no_model_and_is_found_beside_models():
    assert "doctor" in srppo_command("eval", "--help").out
    assert "--responses" in srppo_command("eval", "--help").out
    assert "--judge-url" in srppo_command("eval", "doctor", "--help").out
