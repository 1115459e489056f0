import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from loading import demonstrations, prompts
from srppo.config_data import SourceConfig
from srppo.errors import DataError, ModelError

Write = Callable[[list[Any]], str]
LIMITS: dict[str, Any] = {"max_prompt_tokens": 2000, "limit": None, "seed": 0, "split": "train"}
LONG = " ".join(map(str, range(4000)))
SPECIAL = "What is </s> or <|im_end|> or <|assistant|>?"


def row(text: str) -> dict[str, Any]:
    """'user: a / assistant: b' as messages; 'null' is null."""
    turns = [turn.split(": ", 1) for turn in text.split(" / ")] if text else []
    contents = {"null": None, "empty": "", "blank": "  \n", "long": LONG}
    return {"messages": [{"role": r, "content": contents.get(c, c)} for r, c in turns]}


EDGE_CASES = {  # name: (row, fate as a demonstration, fate as a prompt), each row by itself
    "empty_response": ("user: a / assistant: empty", "empty response", "used"),
    "whitespace_response": ("user: a / assistant: blank", "empty response", "used"),
    "no_assistant": ("user: Hello?", "no assistant turn", "used"),
    "ends_with_user": ("user: a / assistant: b / user: c", "used", "used"),
    "system_only_first": ("system: Be brief. / user: Hi / assistant: Hello.", "used", "used"),
    "assistant_first": ("assistant: Hi / user: Weather? / assistant: Sunny.", "used", "used"),
    "two_users_in_a_row": ("user: a / user: b / assistant: c", "used", "used"),
    "empty_messages": ("", "empty messages", "empty messages"),
    "null_content": ("user: Hi / assistant: null", "empty response", "used"),
    "unknown_role": ("human: Hi / gpt: Hello", "used", "used"),
    "very_long_prompt": ("user: long / assistant: Short.", *["prompt longer than 2000 tokens"] * 2),
    "long_response": ("user: Count. / assistant: long", "truncated", "used"),
    "special_tokens_in_text": (f"user: {SPECIAL} / assistant: {SPECIAL}", "used", "used"),
    "unicode": ("user: Écris en 日本語 🙂 / assistant: こんにちは", "used", "used"),
    "duplicate": ("user: Hi / assistant: Hello.", "used", "used"),
}


def fate(load: Callable[..., Any], source: str, tokenizer: PreTrainedTokenizerFast) -> str:
    more = {"max_response_tokens": 100} if load is demonstrations else {}
    try:
        _, report = load(source, tokenizer, **LIMITS, **more)
    except DataError as error:
        return str(error).split(" x ")[1].split(" (")[0]
    return "truncated" if report.truncated else "used"


@pytest.mark.parametrize("name", EDGE_CASES)
def test_each_edge_case_ends_as_documented(
    tokenizer: PreTrainedTokenizerFast, write: Write, name: str
):
    text, demonstration, prompt = EDGE_CASES[name]
    source = write([row(text)])
    assert fate(demonstrations, source, tokenizer) == demonstration
    assert fate(prompts, source, tokenizer) == prompt


def test_edge_cases_together(tokenizer: PreTrainedTokenizerFast, write: Write):
    texts = [text for text, *_ in EDGE_CASES.values()] + [EDGE_CASES["duplicate"][0]]
    examples, report = demonstrations(
        write([row(text) for text in texts]), tokenizer, **LIMITS, max_response_tokens=100
    )
    assert len(examples) == report.used == 9
    assert report.truncated == 1
    assert report.rows == 16
    assert report.dropped == {
        "empty response": 3,
        "no assistant turn": 1,
        "empty messages": 1,
        "prompt longer than 2000 tokens": 1,
        "duplicate": 1,
    }
    assert sorted(report.dropped_rows["empty response"]) == [1, 2, 9]
    assert report.dropped_rows["duplicate"][0] in (15, 16)


def test_response_is_the_last_answered_turn(tokenizer: PreTrainedTokenizerFast, write: Write):
    source = write([row(EDGE_CASES["ends_with_user"][0])])
    [example], _ = demonstrations(source, tokenizer, **LIMITS, max_response_tokens=9)
    [prompt], _ = prompts(source, tokenizer, **LIMITS)
    assert tokenizer.decode(example.response_ids, skip_special_tokens=True).strip() == "b"
    assert example.prompt_ids == prompt.ids[: len(example.prompt_ids)]
    source = write([row("user: a / assistant: b / user: c / assistant: d")])
    [whole], _ = demonstrations(source, tokenizer, **LIMITS, max_response_tokens=9, turns="last")
    assert prompt.ids == whole.prompt_ids


TALK = "system: s / user: a / assistant: b / user: c / assistant: d / user: e / assistant: f"


def test_each_assistant_turn_is_a_demonstration_and_the_last_stands_last(
    tokenizer: PreTrainedTokenizerFast, write: Write
):
    source = write([row(TALK)])
    limits = LIMITS | {"max_response_tokens": 9}
    examples, report = demonstrations(source, tokenizer, **limits)
    assert (report.used, report.examples) == (1, 3)
    assert [e.final for e in examples] == [False, False, True]
    answers = [tokenizer.decode(e.response_ids, skip_special_tokens=True) for e in examples]
    assert [a.strip() for a in answers] == ["b", "d", "f"]
    assert [e.user for e in examples] == ["a", "a\nc", "a\nc\ne"]
    last, _ = demonstrations(source, tokenizer, **limits, turns="last")
    assert [(e.prompt_ids, e.response_ids) for e in last] == [
        (examples[-1].prompt_ids, examples[-1].response_ids)
    ]


def test_turns_that_do_not_fit_are_left_out_and_counted(
    plain_tokenizer: PreTrainedTokenizerFast, write: Write
):
    talk = row("user: a / assistant: b / user: long / assistant: d / user: e / assistant: empty")
    limits = LIMITS | {"max_response_tokens": 9, "max_prompt_tokens": 200}
    [example], report = demonstrations(write([talk]), plain_tokenizer, **limits)
    assert plain_tokenizer.decode(example.response_ids) == "b</s>"
    assert example.final
    assert report.used == 1
    assert report.turns_dropped == {"empty response": 1, "prompt longer than 200 tokens": 1}


def test_the_limit_counts_conversations(plain_tokenizer: PreTrainedTokenizerFast, write: Write):
    talks = [row(TALK.replace("user: a", f"user: a{i}")) for i in range(4)]
    limits = LIMITS | {"max_response_tokens": 9, "limit": 2}
    examples, report = demonstrations(write(talks), plain_tokenizer, **limits)
    assert (len(examples), report.used, report.not_needed) == (6, 2, 2)


def test_truncated_response_has_no_eos(plain_tokenizer: PreTrainedTokenizerFast, write: Write):
    source = write([{"prompt": "q", "response": "xyzxyz"}])
    [whole], _ = demonstrations(source, plain_tokenizer, **LIMITS, max_response_tokens=7)
    assert len(whole.response_ids) == 7
    assert whole.response_ids[-1] == plain_tokenizer.eos_token_id
    [cut], report = demonstrations(source, plain_tokenizer, **LIMITS, max_response_tokens=6)
    assert cut.response_ids == whole.response_ids[:6]
    assert plain_tokenizer.eos_token_id not in cut.response_ids
    assert report.truncated == 1


ROWS = [{"prompt": f"q{i}", "response": f"r{i}" * (1 + i % 3), "group": str(i)} for i in range(30)]


def test_subsets_are_random_repeatable_and_nested(
    plain_tokenizer: PreTrainedTokenizerFast, write: Write
):
    source = write(ROWS)

    def groups(limit: int | None, seed: int) -> list[Any]:
        limits = LIMITS | {"limit": limit, "seed": seed}
        examples, report = demonstrations(source, plain_tokenizer, **limits, max_response_tokens=50)
        assert report.not_needed == 30 - len(examples)
        return [example.meta["group"] for example in examples]

    everything = groups(None, seed=0)
    assert sorted(everything, key=int) == [str(i) for i in range(30)]
    assert groups(10, seed=0) == everything[:10] != [str(i) for i in range(10)]
    assert groups(10, seed=1) != everything[:10]
    assert groups(99, seed=0) == everything


def test_report_counts_every_row_once(plain_tokenizer: PreTrainedTokenizerFast, write: Write):
    source = write([*ROWS, "no object", {"prompt": "q", "response": ""}, ROWS[0], {"x": 1}])
    limits = LIMITS | {"limit": 20}
    examples, report = demonstrations(source, plain_tokenizer, **limits, max_response_tokens=50)
    data = json.loads(json.dumps(report.to_json()))
    assert data["rows"] == 34
    assert data["used"] + data["not_needed"] + sum(data["dropped"].values()) == 34
    assert data["dropped_rows"]["not an object"] == [31]
    lengths = sorted(len(example.response_ids) for example in examples)
    bars = data["response_tokens"].pop("bars")
    assert data["response_tokens"] == {
        "min": lengths[0],
        "median": (lengths[9] + lengths[10]) / 2,
        "mean": sum(lengths) / 20,
        "max": lengths[-1],
    }
    assert [sum(a <= n <= b for n in lengths) for a, b, _ in bars] == [n for *_, n in bars]
    assert sum(n for *_, n in bars) == 20


def test_a_hundred_row_numbers_are_written_per_reason_and_all_are_known(
    plain_tokenizer: PreTrainedTokenizerFast, write: Write
):
    source = write([{"prompt": "q", "response": None}] * 130 + ROWS)
    _, report = demonstrations(source, plain_tokenizer, **LIMITS, max_response_tokens=50)
    assert report.dropped == {"empty response": 130}
    assert sorted(report.dropped_rows["empty response"]) == list(range(1, 131))
    assert report.to_json()["dropped_rows"]["empty response"] == list(range(1, 101))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], ["holds no rows"]),
        (
            [{"q": 1, "Text": 2}],
            ["columns not understood (rows 1)", "found: Text, q.", "Say which"],
        ),
        (
            [{"prompt": "q"}, {"prompt": "r", "response": " "}],
            ["1 x no response column beside prompt (rows 1)", "1 x empty response (rows 2)"],
        ),
        ([{"prompt;response": "q;r"}], ["not understood", "with commas between its columns"]),
        ([{"prompt": "q"}], ["Columns found: prompt.", "prompt/response", "Say which"]),
        ([{"instruction": "q", "input": "i", "text": "r"}], ["beside input, instruction (rows 1)"]),
        ([{"prompt": [{"role": "user", "content": "q"}]}], ["no response column beside prompt"]),
        ([{"messages": [{"role": "user", "content": "q"}]}], ["no assistant turn", "Repair"]),
        ([{"prompt": "q" * 3000, "response": "r"}], ["longer than 2000", "max_prompt_tokens"]),
        (["x", {"prompt": "q", "response": ""}], ["none of its 2 rows", "1 x not an object"]),
    ],
)
def test_nothing_left_names_source_counts_and_cure(
    plain_tokenizer: PreTrainedTokenizerFast, write: Write, rows: list[Any], words: list[str]
):
    source = write(rows)
    with pytest.raises(DataError) as caught:
        demonstrations(source, plain_tokenizer, **LIMITS, max_response_tokens=50)
    for word in [source, *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "q"}, "x"], r"1 x not an object \(rows \S+:2\).*leave it out"),
        (["x"], r"no readable rows.*leave it out"),
        ([], r"no readable rows.*leave it out"),
    ],
)
def test_a_source_of_a_mixture_that_gives_nothing_is_named(
    plain_tokenizer: PreTrainedTokenizerFast,
    write: Write,
    tmp_path: Path,
    rows: list[Any],
    message: str,
):
    """Else the run would train on another mixture than the one asked for."""
    good = str(Path(write([row("user: a / assistant: b")] * 2)).rename(tmp_path / "good.jsonl"))
    bad = write(rows)
    mixture = [SourceConfig(source=good, weight=1), SourceConfig(source=bad, weight=1)]
    with pytest.raises(DataError, match=message) as caught:
        demonstrations(mixture, plain_tokenizer, **LIMITS, max_response_tokens=50)
    assert str(caught.value).startswith(bad)
    mixture[1] = SourceConfig(source=write([row("user: c / assistant: d")]), weight=1)
    _, report = demonstrations(mixture, plain_tokenizer, **LIMITS, max_response_tokens=50)
    assert report.used_of == {good: 1, bad: 1}


def test_limits_below_one_are_refused(plain_tokenizer: PreTrainedTokenizerFast, write: Write):
    for name in ("limit", "max_prompt_tokens", "max_response_tokens"):
        limits = LIMITS | {"max_response_tokens": 50} | {name: 0}
        with pytest.raises(DataError, match=f"{name}=0 leaves no rows"):
            demonstrations(write(ROWS), plain_tokenizer, **limits)


def test_tokenizer_without_eos(
    make_tokenizer: Callable[[str], PreTrainedTokenizerFast], write: Write
):
    tokenizer = make_tokenizer("byte_level")
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match=r"no EOS token.*Set tokenizer\.eos_token"):
        demonstrations(write(ROWS), tokenizer, **LIMITS, max_response_tokens=50)


def test_template_is_given_and_refusals_are_counted(
    make_tokenizer: Callable[[str], PreTrainedTokenizerFast], strict_template: str, write: Write
):
    source = write([row(EDGE_CASES[name][0]) for name in ("two_users_in_a_row", "duplicate")])
    bare, strict = make_tokenizer("byte_level"), make_tokenizer("byte_level")
    _, report = demonstrations(source, bare, **LIMITS, max_response_tokens=50)
    assert (report.used, bare.chat_template is None) == (2, False)
    strict.chat_template = strict_template
    _, report = demonstrations(source, strict, **LIMITS, max_response_tokens=50)
    assert report.dropped == {"refused by the chat template (roles must alternate)": 1}


@pytest.mark.parametrize(
    "template",
    ["{% for m in messages %}", "{{ messages[0].content + 1 }}", "{{ raise_exception('no') }}"],
)
def test_a_template_that_fails_on_every_row_is_named_with_its_cure(
    make_tokenizer: Callable[[str], PreTrainedTokenizerFast], write: Write, template: str
):
    tokenizer = make_tokenizer("byte_level")
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=r"30 x refused by the chat template \(.*Give the tokeni"):
        demonstrations(write(ROWS), tokenizer, **LIMITS, max_response_tokens=50)


def test_a_file_in_another_encoding_is_named_with_its_cure(
    plain_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0], ensure_ascii=False) + "\n", encoding="utf-16")
    with pytest.raises(DataError, match=r"not UTF-8 \(rows 1.*Save the file as UTF-8"):
        demonstrations(str(path), plain_tokenizer, **LIMITS, max_response_tokens=50)
