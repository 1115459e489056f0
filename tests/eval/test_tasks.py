"""Questions as lm-eval would ask them, chance taken out of what it leaves to chance."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import lm_eval.tasks
import numpy as np
import pytest
import torch
from lm_eval.tasks import TaskManager

import bytewise
from questions import GPQA, GSM8K, IFEVAL, write_jsonl
from srppo.errors import DataError
from srppo.eval.ask import Reader
from srppo.eval.benchmarks import BENCHMARKS, load_questions
from srppo.eval.preflight import require_punkt
from srppo.eval.tasks import Replay, Task


def task_of(name, data_dir, seed=0, **settings):
    questions = load_questions(BENCHMARKS[name], data_dir, seed)
    return Task(BENCHMARKS[name], questions, seed=seed, **settings)


def state():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("chat", [False, True])
def test_prompts_are_those_that_lm_eval_makes_of_the_files(data_dir, tmp_path, chat):
    """The same, read by lm-eval and `datasets` themselves: five examples, drawn as always."""
    tokenizer = bytewise.tokenizer()
    tokenizer.chat_template = bytewise.TEMPLATE
    reader = Reader(tokenizer, chat)
    files = {split: str(data_dir / "gsm8k" / f"{split}.jsonl") for split in ("train", "test")}
    plain = {
        "task": "gsm8k",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(tmp_path)},
    }
    folder = Path(lm_eval.tasks.__file__).parent / "gsm8k"
    manager = TaskManager(include_path=folder, include_defaults=False)
    theirs = manager.load([{"group": "g", "task": [plain]}])["tasks"]["gsm8k"]
    theirs.set_fewshot_seed(1234)
    theirs.build_all_requests(
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        chat_template=reader.conversation if chat else None,
    )
    ours = task_of("gsm8k", data_dir).requests(reader.conversation if chat else None)
    assert [r.args[0] for r in ours] == [r.args[0] for r in theirs.instances]
    assert ours[0].args[0].count("Question: ") == 6
    assert ours[0].args[0].count("<user>") == 6 * chat


def test_a_bound_on_responses_replaces_the_tasks_own(data_dir):
    (first, *_) = task_of("gsm8k", data_dir, max_tokens=7).requests(None)
    assert first.args[1]["max_gen_toks"] == 7
    assert "Question:" in first.args[1]["until"]


def test_without_examples_the_question_stands_alone(data_dir):
    (first, *_) = task_of("gsm8k", data_dir, shots=False).requests(None)
    assert first.args[0] == f"Question: {GSM8K[0][0]}\nAnswer:"


# --- GPQA ----------------------------------------------------------------------------------------


def letters(questions):
    return {doc["Question"]: doc["answer"] for doc in questions.docs}


def test_each_gpqa_question_has_an_order_of_its_own(data_dir, tmp_path):
    """Whatever is around it and whatever was drawn before; another seed, another order."""
    benchmark = BENCHMARKS["gpqa"]
    whole = load_questions(benchmark, data_dir, seed=0)
    write_jsonl(tmp_path / "gpqa.jsonl", GPQA[5:2:-1])
    random.seed(99)
    few = load_questions(benchmark, tmp_path, seed=0)
    assert letters(few).items() <= letters(whole).items()
    assert letters(load_questions(benchmark, data_dir, seed=1)) != letters(whole)
    for doc, row in zip(whole.docs, GPQA, strict=True):
        place = "ABCD".index(doc["answer"].strip("()")) + 1
        assert doc[f"choice{place}"] == row["Correct Answer"]
        assert {doc[f"choice{i}"] for i in range(1, 5)} == set(row.values()) - {row["Question"]}


def test_the_right_gpqa_answer_has_no_favourite_letter(tmp_path):
    write_jsonl(tmp_path / "gpqa.jsonl", [GPQA[0] | {"Question": str(k)} for k in range(400)])
    counts = Counter(letters(load_questions(BENCHMARKS["gpqa"], tmp_path, seed=0)).values())
    assert sum((n - 100) ** 2 / 100 for n in counts.values()) < 11.34  # chi-squared, 3, 1%


def test_gpqa_counts_the_likeliest_letter(data_dir):
    task = task_of("gpqa", data_dir)

    class Knows(Replay):
        def loglikelihood(self, requests):
            """Right but for the first question."""
            return [
                (0.0 if (r.args[1] == f" {r.doc['answer']}") == (r.doc_id > 0) else -9.0, False)
                for r in requests
            ]

    scores = task.scores(task.run(Knows([]), chat=False))
    assert scores == [{"accuracy": 0.0}] + [{"accuracy": 1.0}] * (len(GPQA) - 1)


# --- IFEval --------------------------------------------------------------------------------------


def test_ifevals_scores_and_what_is_random_in_them(with_punkt):
    """Key 3 asks for a letter that is none: its scorer draws one. Both responses have all but q."""
    require_punkt(with_punkt)
    texts = ["a pond.", "Heron, heron.\nHERON", "abcdefghijklmnoprstuvwxyz"]
    before = state()
    runs = []
    for seed in range(12):
        task = task_of("ifeval", with_punkt, seed)
        found = task.run(Replay(texts), chat=False)
        runs.append(task.scores(found))
        assert task.at_random == [3]
        (note,) = task.notes()
        assert "key 3 at random" in note
        again = task_of("ifeval", with_punkt, seed)
        assert again.scores(again.run(Replay(texts), chat=False)) == runs[-1]
    assert state() == before
    for scores in runs:
        assert scores[0] == {
            "prompt_strict": 1.0,
            "prompt_loose": 1.0,
            "inst_strict": [1.0, 1.0],
            "inst_loose": [1.0, 1.0],
        }
        assert scores[1]["prompt_strict"] == 1.0
    assert len(IFEVAL) == len(runs[0]) == 3


def test_another_seed_may_score_a_random_question_otherwise(with_punkt):
    require_punkt(with_punkt)
    texts = ["-", "-", "abcdefghijklm"]  # half of the letters
    seen = {
        task.scores(task.run(Replay(texts), chat=False))[2]["prompt_strict"]
        for task in (task_of("ifeval", with_punkt, seed) for seed in range(12))
    }
    assert seen == {0.0, 1.0}


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["gsm8k/test.jsonl", "gsm8k_test.jsonl", "gsm8k.json", "gsm8k/test.csv"]
)
def test_where_questions_are_found(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    rows = [{"question": q, "answer": a, "more": 1} for q, a in GSM8K]
    if path.suffix == ".csv":
        import csv

        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, ["question", "answer", "more"])
            table.writeheader()
            table.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        write_jsonl(path, rows)
    found = load_questions(BENCHMARKS["gsm8k"], tmp_path, 0, shots=False)
    assert found.docs == [{"question": q, "answer": a} for q, a in GSM8K]


SECRET = "melts at 10 degrees"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda rows: [{k: v for k, v in r.items() if k != "Correct Answer"} for r in rows], "1"),
        (lambda rows: [*rows, 7], "not an object"),
        (lambda rows: [], "is empty"),
        (lambda rows: [rows[0], rows[1] | {"Incorrect Answer 2": None}], "row 2 has no"),
    ],
)
def test_files_that_are_not_the_benchmarks(tmp_path, damage, says):
    write_jsonl(tmp_path / "gpqa.jsonl", damage(GPQA[:3]))
    with pytest.raises(DataError, match=says) as e:
        load_questions(BENCHMARKS["gpqa"], tmp_path, 0)
    assert SECRET not in str(e.value)


@pytest.mark.parametrize("kwargs", ["[{}]", [], ["{}"], [{}, {}]])
def test_ifevals_arguments_that_are_none(tmp_path, kwargs):
    write_jsonl(tmp_path / "ifeval.jsonl", [IFEVAL[1] | {"kwargs": kwargs}])
    with pytest.raises(DataError, match=r"question 2 of ifeval: kwargs is .*own file"):
        load_questions(BENCHMARKS["ifeval"], tmp_path, 0)


def test_an_instruction_without_a_checker_is_found_before_anything_is_asked(with_punkt, tmp_path):
    require_punkt(with_punkt)
    write_jsonl(tmp_path / "ifeval.jsonl", [IFEVAL[1] | {"instruction_id_list": ["a:new_one"]}])
    with pytest.raises(DataError, match=r"question 2 .*'a:new_one', which lm-eval cannot check"):
        task_of("ifeval", tmp_path)


def test_too_few_examples_for_a_prompt(tmp_path):
    rows = [{"question": q, "answer": a} for q, a in GSM8K]
    write_jsonl(tmp_path / "gsm8k_test.jsonl", rows)
    write_jsonl(tmp_path / "gsm8k_train.jsonl", rows)
    with pytest.raises(DataError, match="4 of the 5 examples"):
        load_questions(BENCHMARKS["gsm8k"], tmp_path, 0)


def test_two_files_that_could_be_meant(tmp_path):
    for name in ("a", "b"):
        write_jsonl(tmp_path / "gpqa" / f"{name}.jsonl", GPQA)
    with pytest.raises(DataError, match=r"a\.jsonl and b\.jsonl"):
        load_questions(BENCHMARKS["gpqa"], tmp_path, 0)
    write_jsonl(tmp_path / "gpqa" / "gpqa_main.jsonl", GPQA)  # named so, it is clear
    assert load_questions(BENCHMARKS["gpqa"], tmp_path, 0).source.endswith("gpqa_main.jsonl")


def test_the_hash_is_of_what_is_asked(data_dir, tmp_path):
    benchmark = BENCHMARKS["gsm8k"]
    one = load_questions(benchmark, data_dir, 0)
    assert load_questions(benchmark, data_dir, 1).sha256 == one.sha256
    assert one.first(2).sha256 != one.sha256
    changed = [{"question": q, "answer": a} for q, a in GSM8K[:-1]]
    write_jsonl(tmp_path / "gsm8k_test.jsonl", [*changed, changed[0]])
    write_jsonl(tmp_path / "gsm8k_train.jsonl", one.shots)
    assert load_questions(benchmark, Path(tmp_path), 0).sha256 != one.sha256
