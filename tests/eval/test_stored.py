"""Stored responses: the reference scorers' verdicts, and every row accounted for."""

from __future__ import annotations

import json
import random
from pathlib import Path

import lm_eval
import pytest
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from questions import GSM8K, write_jsonl
from runs import json_lines, srppo_command
from srppo.errors import DataError
from srppo.eval.preflight import Settings, require_punkt
from srppo.eval.stored import match, read_rows, score_stored

QUESTIONS = [question for question, _ in GSM8K]
ANSWERS = ["It is 18.", "1234", "#### 6", "no idea"]


def settings(task, data_dir):
    return Settings((task,), data_dir=data_dir)


# --- what lm-eval's filters say -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "question", "flexible", "strict"),
    [
        ("5 + 13 = 18 pens.\n#### 18", 0, 1, 1),
        ("A: 18", 0, 1, 0),
        ("The answer is 18.", 0, 1, 0),
        ("The answer is 18. She has 18 pens, not 5.", 0, 0, 0),  # the last number counts
        ("#### 18 because 13 + 5", 0, 0, 1),
        ("18.0", 0, 0, 0),
        ("eighteen", 0, 0, 0),
        ("", 0, 0, 0),
        ("#### 1234", 1, 1, 1),
        ("#### 1,234", 1, 1, 1),
        ("It costs $1,234", 1, 1, 0),
        ("$1,234.00", 1, 0, 0),  # 1234.00 is not 1234 to lm-eval
        ("**1,234.**", 1, 1, 0),
        ("-1234", 1, 0, 0),
    ],
)
def test_gsm8k_answers_in_several_formats(data_dir, tmp_path, response, question, flexible, strict):
    path = tmp_path / "r.jsonl"
    write_jsonl(path, [{"prompt": QUESTIONS[question], "response": response}])
    entry, samples, _ = score_stored(path, "gsm8k", settings("gsm8k", data_dir))
    assert samples[0]["scores"] == {"flexible": flexible, "strict": strict}
    assert samples[0]["doc_id"] == question
    assert (entry["n"], entry["metrics"]["flexible"]["value"]) == (1, flexible)
    assert entry["empty"] == (not response)


@pytest.mark.parametrize("task", ["gsm8k", "alpaca_eval"])
@pytest.mark.parametrize("column", ["prompt", "response", "id"])
def test_half_a_character_is_named_with_its_row(data_dir, tmp_path, task, column):
    path = tmp_path / "r.jsonl"
    good = {"prompt": QUESTIONS[0], "response": "#### 18", "id": "1"}
    path.write_text("".join(json.dumps(r) + "\n" for r in [good, {**good, column: "a\ud83d"}]))
    done = srppo_command(
        "eval", "--responses", path, "--task", task, "--data-dir", data_dir, "--out", tmp_path / "o"
    )
    assert done.code == 2
    assert f"{path}, row 2 holds half a character ('\\ud83d' alone)" in done.err
    assert not (tmp_path / "o").exists()


class Said(LM):
    """Says what was stored, to whatever lm-eval asks."""

    def __init__(self, texts):
        super().__init__()
        self.texts = texts

    def generate_until(self, requests):
        return [self.texts[r.doc_id] for r in requests]

    def loglikelihood(self, requests):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def lorem(rng, prompt):
    """Something that follows some instructions."""
    words = ["heron", "*pond*", "<<reed>>", "P.S.", "[name]", "1", "12", "frog.", "Frog!", "\n\n"]
    text = " ".join(rng.choices(words, k=rng.randint(1, 300)))
    forms = [text, text.upper(), text.lower(), f'"{text}"', f"{prompt}\n{text}", f"* {text}\n* x"]
    return rng.choice(forms)


@pytest.mark.parametrize("first", [150, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("task", ["ifeval", "gsm8k"])
def test_all_scores_are_lm_evals_own(shared, tmp_path, task, first):
    """Against `simple_evaluate` on the same files, read by itself; but for IFEval's two random
    questions, and langdetect's chance, which lm-eval leaves open."""
    name = {"ifeval": "ifeval/input_data.jsonl", "gsm8k": "gsm8k/test.jsonl"}[task]
    split = {"ifeval": "train", "gsm8k": "test"}[task]
    rows = json_lines(shared / "data" / name)[:first]
    write_jsonl(tmp_path / name, rows)
    (tmp_path / "nltk_data").symlink_to(shared / "data" / "nltk_data")
    require_punkt(tmp_path)
    prompt = {"ifeval": "prompt", "gsm8k": "question"}[task]
    rng = random.Random(0)
    texts = [lorem(rng, row[prompt]) for row in rows]
    if task == "gsm8k":
        endings = ["", "\n#### {}", " The answer is {}.", " A: {}", " ${}.00"]
        texts = [
            text + rng.choice(endings).format(row["answer"].split("#### ")[1])
            for text, row in zip(texts, rows, strict=True)
        ]
    files = {part: str(tmp_path / name) for part in {split, "train"}}
    config = {
        "task": task,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(tmp_path)},
    }
    theirs = lm_eval.simple_evaluate(
        Said(texts),
        tasks=[{"group": "g", "task": [config]}],
        task_manager=TaskManager(
            include_path=Path(lm_eval.tasks.__file__).parent / task, include_defaults=False
        ),
    )

    stored = [{prompt: row[prompt], "response": t} for row, t in zip(rows, texts, strict=True)]
    rng.shuffle(stored)
    (tmp_path / "stored.json").write_text(json.dumps(stored))
    entry, samples, _ = score_stored(tmp_path / "stored.json", task, settings(task, tmp_path))
    expected: dict[int, dict] = {}
    for sample in theirs["samples"][task]:
        kind = {"flexible-extract": "flexible", "strict-match": "strict"}.get(sample["filter"])
        mine = expected.setdefault(sample["doc_id"], {})
        if kind:
            mine[kind] = sample["exact_match"]
        else:
            for level in ("prompt", "inst"):
                for how in ("strict", "loose"):
                    mine[f"{level}_{how}"] = sample[f"{level}_level_{how}_acc"]
    chance = {i for i, row in enumerate(rows) if row.get("key") in (1122, 1129)}
    chance |= {i for i, row in enumerate(rows) if "langu" in str(row.get("instruction_id_list"))}
    chance |= {i for i, row in enumerate(rows) if "english" in str(row.get("instruction_id_list"))}
    compared = [s for s in samples if s["doc_id"] not in chance]
    assert len(compared) > 0.8 * len(rows)
    assert [s["scores"] for s in compared] == [expected[s["doc_id"]] for s in compared]
    assert [s["response"] for s in samples] == texts
    headline = entry["metrics"][entry["headline"]]["value"]
    assert 0.02 < headline < 0.98
    assert (entry["n"], entry["version"]) == (len(rows), theirs["versions"][task])


# --- which question a response is for -------------------------------------------------------------


def fewshot(question):
    return f"Question: What is 1 + 1?\nAnswer: 2\n\nQuestion: {question}\nAnswer:"


FORMS = {
    "plain": lambda q, a: {"prompt": q, "response": a},
    "blanks": lambda q, a: {"prompt": f"\n  {q.replace(' ', '  ')} \r\n", "response": a},
    "alpaca-eval": lambda q, a: {"instruction": q, "output": a, "generator": "m", "dataset": "d"},
    "one of a list": lambda q, a: {"question": q, "answer": "gold", "completion": [a]},
    "as asked": lambda q, a: {"prompt": f"Question: {q}\nAnswer:", "response": a},
    "with examples": lambda q, a: {"prompt": fewshot(q), "generation": a},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["jsonl", "json", "under a key"])
def test_prompts_and_files_in_many_forms(data_dir, tmp_path, form, layout):
    rows = [FORMS[form](q, a) for q, a in zip(QUESTIONS, ANSWERS, strict=True)][::-1]
    path = tmp_path / "stored"
    text = {
        "jsonl": "\n".join(map(json.dumps, rows)) + "\n\n",
        "json": json.dumps(rows, indent=1),
        "under a key": json.dumps({"model": "m", "model_outputs": rows}),
    }[layout]
    path.write_text(text)
    entry, samples, _ = score_stored(path, "gsm8k", settings("gsm8k", data_dir))
    assert [s["response"] for s in samples] == ANSWERS
    assert [s["scores"]["flexible"] for s in samples] == [1, 1, 1, 0]
    assert entry["notes"] == []


def test_missing_repeated_unknown_and_useless_rows_are_counted_and_named():
    rows = [
        {"prompt": QUESTIONS[2], "response": "first"},
        {"prompt": QUESTIONS[2], "response": "second"},
        {"prompt": "Who?", "response": "?"},
        {"prompt": QUESTIONS[0]},
        {"prompt": QUESTIONS[1], "response": None},
        {"prompt": QUESTIONS[3], "response": ""},
    ]
    matched = match(rows, QUESTIONS, QUESTIONS)
    assert matched.responses == {2: "first", 3: ""}
    summary, missing, again, unknown, useless = matched.notes
    assert summary == "scored over 2 of 4 questions"
    assert missing == (
        "2 question(s) without a response: 'Ann has 5 pens and buys 13. How many has she?', 'A "
        "shed holds 617 bales twice over. How many?'"
    )
    assert again.startswith("1 more response(s)")
    assert "Two ducks" in again
    assert unknown.endswith("none of the questions: 'Who?'")
    assert useless.startswith("2 row(s) without text")
    assert useless.endswith(": row 4, row 5")


def test_a_question_that_is_there_twice_takes_two_responses():
    rows = [{"prompt": "q", "response": r} for r in ("a", "b", "c")]
    matched = match(rows, ["q", "other", "q"], [])
    assert matched.responses == {0: "a", 2: "b"}
    assert any(note.startswith("1 more response(s)") for note in matched.notes)


def test_many_names_are_cut_short():
    matched = match([{"prompt": "0", "response": "x"}], [str(i) for i in range(10)], [])
    assert matched.notes[1] == "9 question(s) without a response: '1', '2', '3', ..."


def test_nothing_that_fits_is_an_error():
    with pytest.raises(DataError, match=r"none of 1 rows answers one of the 4 questions.*'Who\?'"):
        match([{"prompt": "Who?", "response": "x"}], QUESTIONS, [])


@pytest.mark.parametrize(
    "text", ["[1, 2]", '"x"', '{"prompt": "a"}\n{"prompt": ', "nonsense", "[" * 10**5]
)
def test_files_that_hold_no_responses(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match="nothing is scored"):
        read_rows(tmp_path / "x.json")


def test_no_file(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_rows(tmp_path / "none.json")


# --- the command ----------------------------------------------------------------------------------


def stored_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl"
    rows = [{"prompt": q, "response": a} for q, a in zip(QUESTIONS[:3], ANSWERS, strict=False)]
    write_jsonl(path, [*rows, {"prompt": "Who?", "response": "x"}])
    return path


def test_the_command_prints_and_writes_only_where_told(data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = stored_file(tmp_path)
    flags = ("--responses", path, "--task", "gsm8k", "--data-dir", data_dir)
    done = srppo_command("eval", *flags)
    assert done.code == 0, done.err
    assert "mine, gsm8k: scored over 3 of 4 questions" in done.out
    assert "'Who?'" in done.out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.jsonl"]

    done = srppo_command("eval", *flags, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    results = json.loads((tmp_path / "out" / "mine" / "results.json").read_text())
    assert results["model"] == {
        "name": "mine", "path": None, "sha256": None, "responses": str(path),
    }  # fmt: skip
    entry = results["tasks"]["gsm8k"]
    assert (entry["n"], entry["metrics"]["flexible"]["value"]) == (3, 1.0)
    assert entry["mean_length"] is entry["eos_rate"] is entry["template"] is None
    samples = json_lines(tmp_path / "out" / "mine" / "samples" / "gsm8k.jsonl")
    assert [s["doc_id"] for s in samples] == [0, 1, 2]
    assert (tmp_path / "out" / "mine" / "lm_eval" / "gsm8k.json").is_file()


def test_a_name_for_the_file(data_dir, tmp_path):
    path, out = stored_file(tmp_path), tmp_path / "out"
    flags = ("--task", "gsm8k", "--data-dir", data_dir, "--out", out)
    assert srppo_command("eval", "--responses", f"sft={path}", *flags).code == 0
    assert (out / "sft" / "results.json").is_file()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--task", "gpqa"], "decided by likelihoods"),
        ([], "not clear what to measure"),
        (["--task", "nonsense"], "not known"),
        (["--task", "gsm8k,ifeval"], "questions of one task. Name that one"),
    ],
)
def test_what_cannot_be_scored(data_dir, tmp_path, flags, says):
    path = stored_file(tmp_path)
    done = srppo_command("eval", "--responses", path, "--data-dir", data_dir, *flags)
    assert done.code == 2
    assert says in done.err
