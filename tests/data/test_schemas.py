from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srppo.config_data import COLUMNS
from srppo.data.presets import PRESETS
from srppo.data.schemas import SCHEMAS, Message, Reading, RowError, answered, scalars, to_prompt

HH = "\n\nHuman: Hi there\n\nAssistant: Hello!\n\nHuman: Capital of Peru?\n\nAssistant: Lima."
COMPLETIONS = [
    {"fine-grained_score": "nan", "response": "no number"},
    {"fine-grained_score": -(10**400), "response": "no float"},
    {"fine-grained_score": "N/A", "response": "worst"},
    {"fine-grained_score": 3.0, "response": "best"},
    {"fine-grained_score": "2.5", "response": "fair"},
    {"response": "unscored"},
]
U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]

READ = Reading()
ROWS: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "messages": ({"messages": [U, A, U, A], "prompt": "q"}, ["q", "r", "q"], "r"),
    "sharegpt": ({"conversations": SHAREGPT}, ["q"], "r"),
    "prompt_response": ({"prompt": "q", "response": "r"}, ["q"], "r"),
    "prompt_completion": ({"prompt": "q", "completion": "r"}, ["q"], "r"),
    "trl_turns": ({"prompt": [U], "completion": [A]}, ["q"], "r"),
    "alpaca": ({"instruction": "q", "input": "", "output": "r", "text": "x"}, ["q"], "r"),
    "alpaca_input": ({"instruction": "q", "input": "i", "output": "r"}, ["q\n\ni"], "r"),
    "dolly": ({"instruction": "q", "context": "c", "response": "r"}, ["q\n\nc"], "r"),
    "ultrafeedback": ({"instruction": "q", "completions": COMPLETIONS}, ["q"], "best"),
    "gsm8k": (
        {"question": "q", "answer": "15-6=<<15-6=9>>9\n#### 1,250"},
        ["q"],
        "15-6=9\n#### 1,250",
    ),
    "hh_rlhf": (
        {"chosen": HH, "rejected": "x"},
        ["Hi there", "Hello!", "Capital of Peru?"],
        "Lima.",
    ),
    "preferences": ({"prompt": "q", "chosen": [U, A], "rejected": [U, A]}, ["q"], "r"),
}


def to_messages(row: dict[str, Any], reading: Reading = READ) -> tuple[list[Message], str]:
    """Prompt and response of the last answered turn."""
    turns = reading(row).turns
    (last,), _ = answered(turns)
    return turns[:last], turns[last]["content"]


@pytest.mark.parametrize("name", ROWS)
def test_known_columns(name: str):
    row, prompt, response = ROWS[name]
    messages, answer = to_messages(row)
    assert [message["content"] for message in messages] == prompt
    assert messages[-1]["role"] == "user"
    assert answer == response
    assert to_prompt(READ(row).turns) == messages


@pytest.mark.parametrize("column", ["prompt", "instruction", "question"])
def test_rows_without_response_are_prompts_only(column: str):
    assert to_prompt(READ({column: "q"}).turns) == [U]
    with pytest.raises(RowError, match="no assistant turn"):
        to_messages({column: "q"})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"Question": "q"}, "columns not understood"),
        ({}, "columns not understood"),
        ({"messages": None}, "empty messages"),
        ({"messages": "hello"}, "messages is not a list of turns"),
        ({"messages": ["hello"]}, "messages is not a list of turns"),
        ({"messages": [U, {"role": "tool", "content": "x"}]}, "unknown role 'tool'"),
        ({"messages": [{"content": "x"}]}, "unknown role None"),
        ({"messages": [{"role": "user", "content": ["x"]}, A]}, "content is not text"),
        ({"prompt": "q", "response": 12}, "content is not text"),
        ({"prompt": "q\ud800", "response": "r"}, "content is not valid Unicode"),
        ({"prompt": " ", "response": "r"}, "empty prompt"),
        ({"prompt": None, "response": "r"}, "empty prompt"),
        ({"messages": [A]}, "no user turn in the prompt"),
        ({"messages": [A, U]}, "no user turn in the prompt"),
        ({"instruction": "q", "completions": []}, "no assistant turn"),
        ({"instruction": "q", "completions": "x"}, "completions is not a list of objects"),
        ({"chosen": "Lima."}, "chosen does not begin with 'Human:'"),
        ({"chosen": None}, "chosen does not begin with 'Human:'"),
        ({"chosen": HH + "\n\nHuman: Bye\n\nAssistant: "}, "empty response"),
    ],
)
def test_unusable_rows_say_why(row: dict[str, Any], reason: str):
    with pytest.raises(RowError) as caught:
        to_messages(row)
    assert str(caught.value) == reason


def test_meta_is_the_other_scalar_columns():
    row = {
        "question": "q",
        "answer": "r",
        "group": "sort",
        "level": 2,
        "score": 0.5,
        "hard": True,
        "tags": ["x"],
        "more": {"a": 1},
        "none": None,
    }
    conversation = READ(row)
    used = conversation.prompt_columns | conversation.response_columns
    expected = {"group": "sort", "level": 2, "score": 0.5, "hard": True}
    assert scalars(row, used) == expected
    assert scalars(row, conversation.prompt_columns) == expected | {"answer": "r"}


NAMES = [
    *["messages", "conversations", "prompt", "response", "completion", "instruction", "input"],
    *["output", "context", "question", "answer", "completions", "chosen"],
]
KEYS = ["role", "content", "from", "value", "response", "fine-grained_score"]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
SCALARS |= st.sampled_from(["user", "assistant", HH])
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4))
def test_any_json_row_is_read_or_refused(row: dict[str, Any]):
    try:
        prompt, response = to_messages(row)
    except RowError:
        return
    assert response.strip()
    assert any(turn["role"] == "user" and turn["content"].strip() for turn in prompt)


# --- presets, column maps, system turns -----------------------------------------------------------


def test_presets_name_schemas_and_column_maps_name_columns_that_there_are():
    assert {preset.schema for preset in PRESETS.values()} <= SCHEMAS.keys()
    columns = {c for needed, _ in SCHEMAS.values() for c in needed}
    assert columns | {"input", "context", "system"} == set(COLUMNS)


def test_a_schema_that_is_given_wins_over_the_first_that_fits():
    row = {"instruction": "q", "output": "o", "response": "r"}
    assert to_messages(row) == ([U], "o")
    assert to_messages(row, Reading("instruction + response")) == ([U], "r")
    with pytest.raises(RowError, match=r"^no column 'messages'$"):
        Reading("messages")(row)


def test_only_mapped_columns_are_looked_at_and_the_others_are_meta():
    row = {"Q": "q", "A": "r", "messages": "not these", "prompt": "nor this", "group": "g"}
    reading = Reading(columns={"prompt": "Q", "response": "A"})
    assert to_messages(row, reading) == ([U], "r")
    found = reading(row)
    assert (found.prompt_columns, found.response_columns) == ({"Q"}, {"A"})
    assert scalars(row, found.columns).keys() == {"messages", "prompt", "group"}
    with pytest.raises(RowError, match=r"^no column 'A'$"):
        reading({"Q": "q"})


def test_a_system_column_is_the_system_turn_unless_it_is_empty():
    system = {"role": "system", "content": "s"}
    for row in ({"prompt": "q", "response": "r"}, {"instruction": "q", "output": "r"}):
        assert to_messages(row | {"system": "s"}) == ([system, U], "r")
        assert to_messages(row | {"system": None}) == to_messages(row | {"system": " "})
        assert to_messages(row | {"system": ""}) == ([U], "r")
        assert "system" in READ(row | {"system": ""}).prompt_columns


# --- which turns have loss ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("roles", "everything", "last", "problems"),
    [
        ("ua", [1], [1], []),
        ("uaua", [1, 3], [3], []),
        ("suaua", [2, 4], [4], []),
        ("uauau", [1, 3], [3], []),
        ("aua", [2], [2], ["no user turn in the prompt"]),
        ("uaue", [1], None, ["empty response"]),
        ("ueua", [3], [3], ["empty response"]),
        ("uaa", [1, 2], [2], []),
    ],
)
def test_turns_with_loss(roles: str, everything: list[int], last: Any, problems: list[str]):
    """s, u, a: system, user, assistant; e: an assistant turn without text."""
    kinds = {"s": "system", "u": "user", "a": "assistant", "e": "assistant"}
    turns = [{"role": kinds[r], "content": "" if r == "e" else "x"} for r in roles]
    assert answered(turns, "all") == (everything, problems)
    if last is None:
        with pytest.raises(RowError, match="empty response"):
            answered(turns, "last")
    else:
        assert answered(turns, "last") == (last, [])
