"""`srppo eval` from models to result directories: what is written, what survives, what fails."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bytewise
from questions import GPQA, GSM8K, write_jsonl
from runs import json_lines, srppo_command
from srppo.errors import ConfigError, ModelError
from srppo.eval import generate, subjects
from srppo.eval.benchmarks import sha256
from srppo.eval.compare import compare
from srppo.eval.harness import evaluate
from srppo.eval.preflight import Settings
from srppo.eval.responses import Finished
from srppo.progress import Reporter
from srppo.rollout.hf import HFSampler

MANY = 70
"""Questions: three chunks."""


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """More questions of our own than a chunk holds."""
    path = tmp_path_factory.mktemp("many")
    rows = [
        {"question": f"What is {i} and {7 * i % 31} more?", "answer": f"So\n#### {i + 7 * i % 31}"}
        for i in range(MANY)
    ]
    write_jsonl(path / "gsm8k_test.jsonl", rows)
    write_jsonl(path / "gsm8k_train.jsonl", rows[:12])
    write_jsonl(path / "gpqa.jsonl", GPQA)
    return path


def results_of(path: Path) -> dict:
    return json.loads((path / "results.json").read_text())


def run(models, out, settings, **options):
    return evaluate(list(map(str, models)), settings, out, Reporter(quiet=True), **options)


def everything(path: Path) -> dict[str, str]:
    """Every file of a result directory, but for the time that it began at."""
    found = {p.relative_to(path).as_posix(): p.read_text() for p in path.rglob("*") if p.is_file()}
    record = json.loads(found["results.json"])
    found["results.json"] = json.dumps(record | {"created": None})
    return found


# --- what is written ------------------------------------------------------------------------------


def test_plain_and_chat_models_on_all_that_needs_no_judge(
    with_punkt, model_dir, chat_dir, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # as it was, afterwards
    done = srppo_command(
        "eval", f"one={model_dir}", chat_dir, "--data-dir", with_punkt, "--offline",
        "--max-tokens", 20, "--out", tmp_path, "--seed", 3,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "guessing gives 25%" in done.out
    assert "can be chance" in done.out
    for name, template in (("one", "plain"), ("chat", "chat")):
        path = tmp_path / name
        results = results_of(path)
        assert results["schema"] == 1
        assert (results["seed"], results["config"]["max_tokens"]) == (3, 20)
        assert results["failed"] == {}
        assert list(results["tasks"]) == ["ifeval", "gsm8k", "gpqa"]
        for task, entry in results["tasks"].items():
            samples = json_lines(path / "samples" / f"{task}.jsonl")
            assert [s["doc_id"] for s in samples] == list(range(entry["n"]))
            assert entry["template"] == template
            assert (entry["template_sha256"] is None) == (template == "plain")
            assert (path / "lm_eval" / f"{task}.json").is_file()
            for metric, found in entry["metrics"].items():
                values = [s["scores"][metric] for s in samples]
                flat = [v for value in values for v in (value if type(value) is list else [value])]
                assert found["value"] == pytest.approx(sum(flat) / len(flat))
                assert found["low"] <= found["value"] <= found["high"]
        lm_eval = json.loads((path / "lm_eval" / "gsm8k.json").read_text())["results"]["gsm8k"]
        entry = results["tasks"]["gsm8k"]
        assert lm_eval["exact_match,flexible-extract"] == entry["metrics"]["flexible"]["value"]
        samples = json_lines(path / "samples" / "gsm8k.jsonl")
        assert entry["mean_length"] == sum(s["length"] for s in samples) / len(samples)
        assert entry["eos_rate"] == sum(s["ended"] for s in samples) / len(samples)
        assert entry["truncated_responses"] == sum(not s["ended"] for s in samples)
        assert entry["settings"]["shots"] == 5
        assert samples[0]["prompt"] == f"Question: {GSM8K[0][0]}\nAnswer:"
        assert samples[0]["prompt_sha256"] == sha256(samples[0]["prompt"])
    one, chat = (results_of(tmp_path / name)["tasks"] for name in ("one", "chat"))
    for key in ("data_sha256", "prompts_sha256"):
        assert [e[key] for e in one.values()] == [e[key] for e in chat.values()]
    assert any("key 3 at random" in note for note in one["ifeval"]["notes"])
    assert results_of(tmp_path / "one")["model"]["sha256"] is not None
    assert (
        results_of(tmp_path / "one")["model"]["sha256"]
        != results_of(tmp_path / "chat")["model"]["sha256"]
    )


@pytest.mark.slow
def test_alpaca_eval_with_a_local_judge(data_dir, model_dir, chat_dir, tmp_path, monkeypatch):
    """Who judges so is no reference judge, and the figure says who."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # as it was, afterwards
    pytest.importorskip("alpaca_eval")
    done = srppo_command(
        "eval", f"m={chat_dir}", "--tasks", "alpaca_eval", "--judge", model_dir, "--limit", 2,
        "--data-dir", data_dir, "--offline", "--max-tokens", 12, "--out", tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    entry = results_of(tmp_path / "m")["tasks"]["alpaca_eval"]
    (headline,) = entry["metrics"]
    assert headline.startswith("win_rate@")
    assert (entry["n"], entry["template"]) == (2, "chat")
    samples = json_lines(tmp_path / "m" / "samples" / "alpaca_eval.jsonl")
    assert [s["prompt"] for s in samples] == ["Name 2 ponds.", "Name 3 ponds."]
    assert entry["mean_length"] == sum(s["length"] for s in samples) / 2
    assert all(0 <= s["scores"][headline] <= 1 for s in samples)
    before = everything(tmp_path / "m")
    done = srppo_command(
        "eval", f"m={chat_dir}", "--tasks", "alpaca_eval", "--judge", model_dir, "--limit", 2,
        "--data-dir", data_dir, "--offline", "--max-tokens", 12, "--out", tmp_path, "--resume",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert everything(tmp_path / "m") == before


def test_gpqas_questions_are_nowhere_in_plain_text(data_dir, model_dir, tmp_path):
    done = srppo_command(
        "eval", f"m={model_dir}", "--tasks", "gpqa", "--data-dir", data_dir, "--out", tmp_path
    )
    assert done.code == 0, done.err
    written = {p: p.read_text() for p in tmp_path.rglob("*") if p.is_file()}
    assert {p.name for p in written} == {"results.json", "gpqa.json", "gpqa.jsonl"}
    for text in [*written.values(), done.out, done.err]:
        assert "invented metals" not in text
        assert "metal number" not in text
    samples = json_lines(tmp_path / "m" / "samples" / "gpqa.jsonl")
    assert samples[0].keys() == {"doc_id", "prompt_sha256", "choice", "answer", "scores"}
    assert [s["scores"]["accuracy"] for s in samples] == [
        float(s["choice"] == s["answer"]) for s in samples
    ]


def test_a_failure_while_gpqa_is_scored_does_not_quote_it(
    data_dir, model_dir, tmp_path, monkeypatch, capsys
):
    def fail(role, sequences, budget):
        raise RuntimeError(f"bad text: {GPQA[0]['Question']}")

    monkeypatch.setattr(generate, "_score", fail)
    (found,) = run([model_dir], tmp_path, Settings(("gpqa", "gsm8k"), data_dir=data_dir, limit=2))
    assert found.record["failed"].keys() == {"gpqa"}
    assert "gsm8k" in found.record["tasks"]
    assert "invented metals" not in json.dumps(found.record) + "".join(capsys.readouterr())


def test_a_base_with_a_template_is_asked_with_and_without(data_dir, chat_dir, model_dir, tmp_path):
    settings = Settings(("gsm8k",), data_dir=data_dir, limit=1, max_tokens=3)
    found = run([f"base={chat_dir}", f"other={chat_dir}"], tmp_path, settings)
    asked = {r.path.name: r.record["tasks"]["gsm8k"]["template"] for r in found}
    assert asked == {"base": "chat", "base-plain": "plain", "other": "chat"}
    found = run([f"base={model_dir}"], tmp_path / "none", settings)
    assert [r.path.name for r in found] == ["base"]


def test_a_base_without_a_template_can_be_compared_once_asked_through_the_file_that_is_named(
    data_dir, chat_dir, model_dir, tmp_path
):
    models = [f"base={model_dir}", f"mine={chat_dir}"]
    settings = Settings(("gsm8k",), data_dir=data_dir, limit=2, max_tokens=3)
    run(models, tmp_path, settings)
    with pytest.raises(ConfigError, match="not asked the same") as error:
        compare({name: tmp_path / name for name in ("base", "mine")})
    (file,) = re.findall(r"--chat-template for both, (\S+), which is mine's", str(error.value))
    run(models, tmp_path / "again", replace(settings, chat_template=file))
    found = compare({name: tmp_path / "again" / name for name in ("base", "mine")})
    assert {row["template"] for row in found["rows"]} == {"chat"}


def test_adapters_and_run_directories_are_models_too(data_dir, tmp_path):
    """A run stands for its policy; an adapter that changes nothing says what its base says."""
    from peft import LoraConfig, get_peft_model

    base = tmp_path / "base_model"
    bytewise.byte_llama().save_pretrained(base)
    bytewise.tokenizer().save_pretrained(base)
    model = get_peft_model(bytewise.byte_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = str(base)
    adapter = tmp_path / "run" / "policy"
    model.save_pretrained(adapter)
    (tmp_path / "run" / "run.json").write_text("{}")
    settings = Settings(("gsm8k",), data_dir=data_dir, max_tokens=9)
    found = run([f"a={base}", tmp_path / "run", f"c={adapter}"], tmp_path / "out", settings)
    said = {
        r.path.name: [s["response"] for s in json_lines(r.path / "samples" / "gsm8k.jsonl")]
        for r in found
    }
    assert said["a"] == said["run"] == said["c"]
    assert any(said["a"])


def test_what_a_context_takes_is_counted_and_said(data_dir, tokenizer, tmp_path):
    path = tmp_path / "small"
    bytewise.byte_llama(context=300).save_pretrained(path)
    tokenizer.save_pretrained(path)
    done = srppo_command(
        "eval", path, "--tasks", "gsm8k", "--data-dir", data_dir, "--out", tmp_path / "out"
    )
    assert done.code == 0, done.err
    entry = results_of(tmp_path / "out" / "small")["tasks"]["gsm8k"]
    assert entry["truncated_prompts"] == len(GSM8K)
    assert entry["settings"]["max_tokens"] == 150
    assert entry["settings"]["max_tokens_wanted"] == 256
    assert "responses have at most 150 tokens instead of 256" in done.out + done.err
    assert "4 of 4 prompts lose their beginning" in done.out


# --- what fails -----------------------------------------------------------------------------------


def test_what_fails_is_written_down_and_the_others_go_on(
    data_dir, model_dir, tmp_path, monkeypatch
):
    sample = HFSampler.sample

    def only_once(self, *args, **kwargs):
        monkeypatch.setattr(HFSampler, "sample", sample)
        raise ModelError("no luck")

    monkeypatch.setattr(HFSampler, "sample", only_once)
    done = srppo_command(
        "eval", f"a={model_dir}", f"b={model_dir}", "--tasks", "gsm8k,gpqa",
        "--data-dir", data_dir, "--out", tmp_path, "--max-tokens", 5,
    )  # fmt: skip
    assert done.code == 1
    assert "a, gsm8k FAILED: no luck" in done.out
    a, b = results_of(tmp_path / "a"), results_of(tmp_path / "b")
    assert a["failed"] == {"gsm8k": "no luck"}
    assert list(a["tasks"]) == ["gpqa"]
    assert (b["failed"], list(b["tasks"])) == ({}, ["gsm8k", "gpqa"])
    done = srppo_command(
        "eval", f"a={model_dir}", "--tasks", "gsm8k,gpqa", "--resume",
        "--data-dir", data_dir, "--out", tmp_path, "--max-tokens", 5,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert results_of(tmp_path / "a")["tasks"] == b["tasks"]
    assert results_of(tmp_path / "a")["failed"] == {}


def test_a_model_that_cannot_be_loaded_fails_alone(data_dir, model_dir, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(model_dir, broken)
    weights = load_file(broken / "model.safetensors")
    save_file(dict(list(weights.items())[1:]), broken / "model.safetensors", {"format": "pt"})
    settings = Settings(("gsm8k",), data_dir=data_dir, max_tokens=4)
    broken_one, fine = run([broken, f"fine={model_dir}"], tmp_path / "out", settings)
    assert "lacks 1 weight" in broken_one.record["failed"]["gsm8k"]
    assert (fine.record["failed"], len(fine.record["tasks"])) == ({}, 1)


def test_one_model_is_in_memory_at_a_time(data_dir, model_dir, tmp_path, monkeypatch):
    loaded: list[weakref.ref] = []
    load = subjects.load_model

    def watched(*arguments):
        assert [model() for model in loaded] == [None] * len(loaded)
        loaded.append(weakref.ref(model := load(*arguments)))
        return model

    monkeypatch.setattr(subjects, "load_model", watched)
    gc.disable()  # nothing may wait for it
    settings = Settings(("gsm8k", "gpqa"), data_dir=data_dir, max_tokens=4)
    found = run([f"a={model_dir}", f"b={model_dir}"], tmp_path, settings)
    gc.enable()
    assert len(loaded) == 2
    assert all(results.record["failed"] == {} for results in found)


# --- interruptions --------------------------------------------------------------------------------

SETTINGS = {"max_tokens": 16}


@pytest.fixture(scope="module")
def whole(many, model_dir, tmp_path_factory) -> Path:
    """Never interrupted."""
    out = tmp_path_factory.mktemp("whole")
    run([f"m={model_dir}"], out, Settings(("gsm8k", "gpqa"), data_dir=many, **SETTINGS))
    return out / "m"


@pytest.mark.parametrize("finished", [0, 1, 2])
def test_no_finished_question_is_asked_again_and_the_files_are_the_same(
    many, model_dir, tmp_path, monkeypatch, whole, finished
):
    settings = Settings(("gsm8k", "gpqa"), data_dir=many, **SETTINGS)
    asked: list[int] = []
    sample = HFSampler.sample

    def counted(self, prompts, *args, **kwargs):
        if len(asked) == finished and "interrupted" not in state:
            state.add("interrupted")
            raise KeyboardInterrupt
        asked.append(len(prompts))
        return sample(self, prompts, *args, **kwargs)

    state: set[str] = set()
    monkeypatch.setattr(HFSampler, "sample", counted)
    with pytest.raises(KeyboardInterrupt):
        run([f"m={model_dir}"], tmp_path, settings)
    began = results_of(tmp_path / "m")["created"]
    run([f"m={model_dir}"], tmp_path, settings, resume=True)
    assert sum(asked) == MANY
    assert everything(tmp_path / "m") == everything(whole)
    assert results_of(tmp_path / "m")["created"] == began


def test_a_finished_evaluation_asks_nothing_and_loads_nothing(
    many, model_dir, tmp_path, monkeypatch, whole
):
    settings = Settings(("gsm8k", "gpqa"), data_dir=many, **SETTINGS)
    shutil.copytree(whole, tmp_path / "m")
    monkeypatch.setattr("srppo.eval.subjects.load_model", None)
    run([f"m={model_dir}"], tmp_path, settings, resume=True)
    assert everything(tmp_path / "m") == everything(whole)


def torn(path: Path, keep: int) -> None:
    """As if the machine had stopped in the middle of writing."""
    path.write_bytes(path.read_bytes()[:keep])


@pytest.mark.parametrize("share", [0.0, 0.005, 0.7, 0.999])
def test_a_file_that_was_cut_anywhere_is_made_whole(many, model_dir, tmp_path, whole, share):
    settings = Settings(("gsm8k", "gpqa"), data_dir=many, **SETTINGS)
    shutil.copytree(whole, tmp_path / "m")
    for path in (tmp_path / "m" / "responses").iterdir():
        torn(path, int(share * path.stat().st_size))
    shutil.rmtree(tmp_path / "m" / "samples")
    run([f"m={model_dir}"], tmp_path, settings, resume=True)
    assert everything(tmp_path / "m") == everything(whole)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_real_signals(many, model_dir, tmp_path, how):
    """The same as above with processes: stopped after the first chunk, then gone on with."""
    command = [
        sys.executable, "-m", "srppo", "eval", f"m={model_dir}", "--tasks", "gsm8k,gpqa",
        "--data-dir", str(many), "--max-tokens", "200", "--out",
    ]  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([*command, str(tmp_path / "whole")], check=True, env=environment)

    # A child of a test run in the background would otherwise inherit that SIGINT is ignored.
    process = subprocess.Popen(
        [*command, str(tmp_path / "cut")],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    kept = tmp_path / "cut" / "m" / "responses" / "gsm8k.jsonl"
    while not (kept.exists() and kept.read_bytes().count(b"\n") > 1):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)
    process.send_signal(how)
    _, said = process.communicate(timeout=120)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGKILL: -9}[how]
    if how == signal.SIGINT:
        assert "--resume goes on where it was" in said
    before = kept.read_bytes()
    assert before.count(b"\n") <= MANY
    done = subprocess.run([*command, str(tmp_path / "cut"), "--resume"], env=environment)
    assert done.returncode == 0
    whole_lines = before[: before.rindex(b"\n") + 1].splitlines()
    assert kept.read_bytes().splitlines()[: len(whole_lines)] == whole_lines
    assert everything(tmp_path / "cut" / "m") == everything(tmp_path / "whole" / "m")


# --- directories that are taken -------------------------------------------------------------------


def test_directories_that_are_taken(data_dir, model_dir, chat_dir, tmp_path):
    settings = Settings(("gsm8k",), data_dir=data_dir, max_tokens=4, limit=2)
    run([f"m={model_dir}"], tmp_path, settings)
    with pytest.raises(ConfigError, match=r"holds an evaluation of .* already.*--resume"):
        run([f"m={model_dir}"], tmp_path, settings)
    with pytest.raises(ConfigError, match="evaluation with path="):
        run([f"m={chat_dir}"], tmp_path, settings, resume=True)
    (tmp_path / "n").mkdir()
    (tmp_path / "n" / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="no evaluation of srppo"):
        run([f"n={model_dir}"], tmp_path, settings)
    (tmp_path / "o").write_text("mine")
    with pytest.raises(ConfigError, match="is a file"):
        run([f"o={model_dir}"], tmp_path, settings)
    with pytest.raises(ConfigError, match=r"o is not a directory that you may write to"):
        run([f"p={model_dir}"], tmp_path / "o", settings)
    assert (tmp_path / "n" / "thesis.tex").read_text() == "mine"


def test_going_on_with_other_settings_is_refused(data_dir, model_dir, tmp_path):
    settings = Settings(("gsm8k",), data_dir=data_dir, max_tokens=4, limit=2)
    run([f"m={model_dir}"], tmp_path, settings)
    other = Settings(("gsm8k",), data_dir=data_dir, max_tokens=5, limit=2)
    with pytest.raises(ConfigError, match="max_tokens=4, now it is 5"):
        run([f"m={model_dir}"], tmp_path, other, resume=True)


def test_going_on_with_other_questions_is_refused(data_dir, many, model_dir, tmp_path):
    run([f"m={model_dir}"], tmp_path, Settings(("gsm8k",), data_dir=data_dir, max_tokens=4))
    other = Settings(("gsm8k",), data_dir=many, max_tokens=4)
    (found,) = run([f"m={model_dir}"], tmp_path, other, resume=True)
    assert "requests_sha256" in found.record["failed"]["gsm8k"]
    assert results_of(tmp_path / "m")["tasks"] == {}


def test_weights_that_changed_are_another_model(data_dir, model_dir, tmp_path):
    mine = tmp_path / "model"
    shutil.copytree(model_dir, mine)
    settings = Settings(("gsm8k",), data_dir=data_dir, max_tokens=4, limit=2)
    run([f"m={mine}"], tmp_path / "out", settings)
    bytewise.byte_llama(seed=5).save_pretrained(mine)
    with pytest.raises(ConfigError, match="evaluation with sha256="):
        run([f"m={mine}"], tmp_path / "out", settings, resume=True)


def test_more_tasks_join_those_that_are_there(data_dir, model_dir, tmp_path):
    settings = Settings(("gpqa",), data_dir=data_dir, max_tokens=4)
    run([f"m={model_dir}"], tmp_path, settings)
    first = results_of(tmp_path / "m")["tasks"]["gpqa"]
    settings = Settings(("gsm8k",), data_dir=data_dir, max_tokens=4)
    run([f"m={model_dir}"], tmp_path, settings, resume=True)
    tasks = results_of(tmp_path / "m")["tasks"]
    assert list(tasks) == ["gsm8k", "gpqa"]
    assert tasks["gpqa"] == first


def test_answers_that_cannot_be_written_end_with_the_cure(small_disk):
    path = small_disk / "a.jsonl"
    finished = Finished(path, {"model": "m"}, [[0]])
    with pytest.raises(OSError, match=r"No space left.*--resume"):
        finished.add([{"request": 0, "text": "x" * 2**20}])


def test_bfloat16_weights_are_scored_and_sampled_in_it(data_dir, model_dir, tmp_path, monkeypatch):
    seen = set()
    sample = HFSampler.sample

    def watched(self, *args, **kwargs):
        seen.add(self.models[0].model.dtype)
        return sample(self, *args, **kwargs)

    monkeypatch.setattr(HFSampler, "sample", watched)
    settings = Settings(("gsm8k",), data_dir=data_dir, max_tokens=4, dtype="bfloat16")
    (found,) = run([f"m={model_dir}"], tmp_path, settings)
    assert found.record["failed"] == {}
    assert seen == {torch.bfloat16}
