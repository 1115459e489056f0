"""What a run reads: roles of the sources, what is held out, and the overlap by hand."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from loading import opened
from srppo.config import Recipe, parse_recipe
from srppo.data.demonstrations import read_demonstrations
from srppo.data.describe import describe_overlap
from srppo.data.load import Data, fingerprint, read_data

Write = Callable[[list[Any]], str]
WORDS = "one two three four five six seven eight nine"
ROWS = [{"prompt": f"{WORDS} {i}", "response": f"r{i}", "group": str(i)} for i in range(40)]


def recipe(data: dict[str, Any], **settings: Any) -> Recipe:
    tree = {"name": "n", "output_dir": "o", "model": {"base": "b"}, "data": data, **settings}
    return parse_recipe(tree)


@pytest.fixture
def read(plain_tokenizer: PreTrainedTokenizerFast) -> Callable[..., Data]:
    def read(data: dict[str, Any], **settings: Any) -> Data:
        return read_data(recipe(data, **settings), plain_tokenizer)

    return read


def groups(items: Any) -> list[str]:
    return [item.meta["group"] for item in items]


def test_same_prompts(read: Callable[..., Data], write: Write):
    source = write(ROWS)
    data = read({"demonstrations": source, "demonstrations_limit": 10, "held_out": 5})
    assert groups(data.prompts) == groups(data.train)
    assert len(data.train) == 10
    assert len(data.held_out) == 5
    explicit = read(
        {
            "demonstrations": source,
            "demonstrations_limit": 10,
            "held_out": 5,
            "overlap": "same",
            "prompts_limit": 4,
        }
    )
    assert groups(explicit.prompts) == groups(data.train)[:4]
    overlap = data.reports["overlap"]
    assert overlap["setting"] == "same"
    assert (overlap["of"], overlap["exact"], overlap["ngram"]) == (10, 10, 10)
    assert overlap["evaluated"] == 0


def test_disjoint_prompts_of_the_same_set(read: Callable[..., Data], write: Write):
    source = write([*ROWS, "no row", *ROWS[:5]])
    settings = {"demonstrations": source, "demonstrations_limit": 10, "held_out": 5}
    data = read({**settings, "overlap": "disjoint"})
    taken = set(groups(data.train)) | set(groups(data.held_out))
    assert len(taken) == 15
    assert set(groups(data.prompts)) == {str(i) for i in range(40)} - taken
    assert len(data.prompts) == 25
    overlap = data.reports["overlap"]
    assert (overlap["setting"], overlap["of"], overlap["exact"]) == ("disjoint", 25, 0)
    assert overlap["ngram"] == 25  # half of the grams are the words that all have in common


def test_prompts_of_another_set_and_contamination(
    read: Callable[..., Data], write: Write, tmp_path: Any
):
    other = tmp_path / "other.jsonl"
    new = [{"prompt": f"a wholly different question about number {i}"} for i in range(6)]
    other.write_text("".join(json.dumps(r) + "\n" for r in [*new, {"prompt": ROWS[0]["prompt"]}]))
    test = tmp_path / "test.jsonl"
    questions = [ROWS[1]["prompt"], f"{WORDS} unheard", "a wholly new one", new[0]["prompt"]]
    test.write_text("".join(json.dumps({"prompt": q}) + "\n" for q in questions))
    data = read(
        {"demonstrations": write(ROWS), "held_out": 0, "prompts": str(other)},
        eval={"prompts": str(test), "split": "test"},
    )
    overlap = data.reports["overlap"]
    assert overlap == {
        "setting": "other",
        "of": 7,
        "exact": 1,
        "ngram": 1,
        "evaluated": 1,
        "contamination": {
            "of": 4,
            "demonstrations": {"exact": 1, "ngram": 2},
            "prompts": {"exact": 1, "ngram": 3},
        },
    }
    said = describe_overlap(overlap)
    assert "evaluation: of 4 prompts, 1 are among the demonstrations exactly, 2 by" in said
    assert "evaluation: of 4 prompts, 1 are among the prompts of stage 2 exactly, 3 by" in said


def test_the_map_of_the_columns_holds_for_the_evaluation_unless_it_has_its_own(
    read: Callable[..., Data], write: Write, tmp_path: Path
):
    ours = str(
        Path(write([{"Q": f"q{i}", "A": "a"} for i in range(10)])).rename(tmp_path / "o.jsonl")
    )
    data = {"demonstrations": ours, "columns": {"prompt": "Q", "response": "A"}}
    source = write([{"Q": "Q?", "A": "a", "prompt": "no"}])
    for columns, asked in ((None, "Q?"), ({"prompt": "prompt"}, "no"), ({}, "no")):
        found = read(data, eval={"prompts": source, "columns": columns})
        assert [prompt.user for prompt in found.eval_prompts] == [asked]


def test_nothing_is_said_of_an_evaluation_that_there_is_not(
    read: Callable[..., Data], write: Write
):
    data = read({"demonstrations": write(ROWS), "held_out": 0})
    assert data.reports["overlap"]["contamination"]["of"] == 0
    assert "evaluation" not in describe_overlap(data.reports["overlap"])


def test_the_last_conversations_are_held_out_in_their_order(
    read: Callable[..., Data], write: Write
):
    source = write(ROWS)
    drawn = groups(read({"demonstrations": source, "held_out": 0}).train)
    data = read({"demonstrations": source, "demonstrations_limit": 20, "held_out": 6})
    assert (groups(data.train), groups(data.held_out)) == (drawn[:20], drawn[20:26])
    data = read({"demonstrations": source, "held_out": 6})
    assert (groups(data.train), groups(data.held_out)) == (drawn[:36], drawn[36:])
    assert data.none_held_out == ""


def answers(row: dict[str, Any], n: int) -> list[dict[str, Any]]:
    """Several demonstrations of its prompt."""
    return [{**row, "response": f"{row['response']} {k}"} for k in range(n)]


def test_a_prompt_is_held_out_with_all_of_its_demonstrations(
    read: Callable[..., Data], write: Write
):
    """Answers of one prompt lie apart after the shuffle: one by one, hardly any would be left."""
    source = write([demonstration for row in ROWS for demonstration in answers(row, 4)])
    data = read({"demonstrations": source, "held_out": 10})
    assert (len(data.train), len(data.held_out)) == (152, 8)
    assert not set(groups(data.train)) & set(groups(data.held_out))
    assert len(set(groups(data.held_out))) == 2
    limited = read({"demonstrations": source, "demonstrations_limit": 60, "held_out": 40})
    assert len(limited.train) == 60
    assert len(limited.held_out) == 40
    assert not set(groups(limited.train)) & set(groups(limited.held_out))


def test_why_nothing_is_held_out_is_said(read: Callable[..., Data], write: Write):
    source = write([demonstration for row in ROWS[:3] for demonstration in answers(row, 20)])
    data = read({"demonstrations": source, "held_out": 10})
    assert (len(data.train), len(data.held_out)) == (60, 0)
    assert "each prompt here has more than the 6 that may be. Give" in data.none_held_out
    assert "a tenth is at most" in read({"demonstrations": write(ROWS[:9])}).none_held_out
    prompts = {"prompts": source, "demonstrations": None}
    assert read(prompts, model={"base": "b", "sft": "s"}).none_held_out.startswith("there are no ")


TALKS = [
    {
        "messages": [
            {"role": role, "content": f"{role} {i} {k}"}
            for k in range(3)
            for role in ("user", "assistant")
        ],
        "group": str(i),
    }
    for i in range(20)
]


def test_conversations_are_held_out_whole_and_ppo_starts_from_last_turns(
    read: Callable[..., Data], write: Write
):
    data = read({"demonstrations": write(TALKS), "demonstrations_limit": 12, "held_out": 4})
    assert len(data.train) == 36
    assert len(set(groups(data.train))) == 12
    assert len(data.held_out) == len(set(groups(data.held_out))) == 4
    assert not set(groups(data.held_out)) & set(groups(data.train))
    assert all(e.final for e in data.held_out)
    assert len(data.prompts) == 12
    assert all(prompt.text.count("<|user|>") == 3 for prompt in data.prompts)
    last = read(
        {
            "demonstrations": write(TALKS),
            "demonstrations_limit": 12,
            "held_out": 4,
            "assistant_turns": "last",
        }
    )
    assert groups(last.train) == groups(data.train)[::3]
    assert [p.ids for p in last.prompts] == [p.ids for p in data.prompts]
    assert [e.prompt_ids for e in last.held_out] == [e.prompt_ids for e in data.held_out]


def test_the_fingerprint_knows_ids_and_roles(read: Callable[..., Data], write: Write):
    data = read({"demonstrations": write(ROWS), "held_out": 4})
    again = read({"demonstrations": write(ROWS), "held_out": 4})
    assert fingerprint(data) == fingerprint(again)
    swapped = Data(data.held_out, list(data.train), data.prompts, [], [])
    fewer = Data(data.train, data.held_out, data.prompts[1:], [], [])
    assert len({fingerprint(d) for d in (data, swapped, fewer)}) == 3


def test_columns_of_the_recipe_reach_every_source(read: Callable[..., Data], write: Write):
    rows = [{"Q": row["prompt"], "A": row["response"]} for row in ROWS]
    source = write(rows)
    data = read(
        {
            "demonstrations": [{"source": source, "limit": 20}],
            "prompts": source,
            "held_out": 0,
            "columns": {"prompt": "Q", "response": "A"},
        }
    )
    assert (len(data.train), len(data.prompts)) == (20, 40)


def test_demonstrations_do_not_stay_in_memory(
    plain_tokenizer: PreTrainedTokenizerFast, write: Write
):
    """8 MB of rows and 3 million ids, which as lists take more than 24 MB."""
    source = write([{"prompt": f"{i}", "response": "12 " * 1000} for i in range(1500)] * 2)
    tracemalloc.start()
    examples, report = read_demonstrations(
        opened(source, 0, {}),
        plain_tokenizer,
        max_prompt_tokens=5000,
        max_response_tokens=5000,
        limit=None,
        seed=0,
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(examples), report.dropped) == (1500, {"duplicate": 1500})
    assert sum(len(e.response_ids) for e in examples[::100]) * 100 > 1_400_000
    assert peak < 4_000_000
