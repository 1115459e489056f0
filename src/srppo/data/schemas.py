"""What the columns of a row mean: any known row becomes a list of turns.

| columns | data sets | turns |
|---|---|---|
| messages, or conversations | TULU, UltraChat, ShareGPT | the turns; role/content or from/value |
| prompt + response, or completion | TRL | two turns; each may itself be a list of turns |
| instruction + completions | UltraFeedback | completion of the best `fine-grained_score` |
| instruction (+ input) + output | Alpaca | input after a blank line, unless empty |
| instruction (+ context) + response | Dolly | likewise |
| question + answer | GSM8K | calculator marks `<<2+2=4>>` are taken out of the answer |
| chosen | hh-rlhf | "Human:"/"Assistant:" in one string, or a list of turns |
| prompt, instruction or question alone | IFEval | one user turn: good for prompts only |

The first line that fits counts. Roles human and gpt are read as user and assistant.
"""

import re
from dataclasses import dataclass
from typing import Any

from srppo.data.sources import Row, Rows, read_rows
from srppo.errors import DataError

__all__ = [
    "Conversation",
    "Message",
    "Row",
    "RowError",
    "Rows",
    "read_conversation",
    "read_rows",
    "scalars",
    "to_messages",
    "to_prompt",
]

Message = dict[str, str]
"""One turn: role (system, user or assistant) and content."""

UNDERSTOOD = (
    "messages, conversations, prompt/response, prompt/completion, instruction/completions, "
    "instruction/input/output, instruction/context/response, question/answer, chosen"
)
ROLES = {r: r for r in ("system", "user", "assistant")} | {"human": "user", "gpt": "assistant"}
_RESPONSES = {
    "prompt": ("response", "completion"),
    "instruction": ("output", "response"),
    "question": ("answer",),
}


class RowError(DataError):
    """A row that cannot be used; the message is the reason that it is counted under."""


@dataclass(frozen=True)
class Conversation:
    """The turns of a row, and which of its columns they came from."""

    turns: list[Message]
    prompt_columns: frozenset[str]
    response_columns: frozenset[str] = frozenset()


def to_messages(row: Row) -> tuple[list[Message], str]:
    """Prompt and response of a demonstration: the last assistant turn and everything before it.

    Turns after the last assistant turn have no answer and are left out.

    Raises:
        RowError: the row has no such pair; the message is the reason.
    """
    turns = read_conversation(row).turns
    last = _last(turns, "assistant")
    if last is None:
        raise RowError("no assistant turn" if turns else "empty messages")
    if not turns[last]["content"].strip():
        raise RowError("empty response")
    return _require_user(turns[:last]), turns[last]["content"]


def to_prompt(row: Row) -> list[Message]:
    """Prompt of a row: everything up to the last user turn, whether an answer follows or not.

    Equals the prompt of `to_messages` where the last user turn is followed by one assistant turn
    and nothing else.

    Raises:
        RowError: there is no user turn, or it is empty.
    """
    turns = read_conversation(row).turns
    last = _last(turns, "user")
    if not turns:
        raise RowError("empty messages")
    return _require_user(turns[: 0 if last is None else last + 1])


def scalars(row: Row, used: frozenset[str]) -> dict[str, str | int | float | bool]:
    """The columns of a row that are not `used` and hold a str, int, float or bool."""
    return {k: v for k, v in row.items() if k not in used and isinstance(v, str | int | float)}


def read_conversation(row: Row) -> Conversation:
    """The turns of a row; roles mapped, null content read as empty.

    Raises:
        RowError: the columns are not understood, or a turn is malformed.
    """
    for column in ("messages", "conversations"):
        if column in row:
            return Conversation(_turns(row[column]), frozenset({column}))
    if "instruction" in row and "completions" in row:
        turns = _as_turns(row["instruction"], "user") + _best_completion(row["completions"])
        return Conversation(turns, frozenset({"instruction"}), frozenset({"completions"}))
    for prompt, responses in _RESPONSES.items():
        for response in responses:
            if prompt in row and response in row:
                return _pair(row, prompt, response)
    if "chosen" in row:
        return Conversation(_human_assistant(row["chosen"]), frozenset({"chosen"}))
    for prompt in _RESPONSES:
        if prompt in row:
            return _pair(row, prompt, None)
    raise RowError("columns not understood")


def _pair(row: Row, prompt: str, response: str | None) -> Conversation:
    turns = _as_turns(row[prompt], "user")
    columns = {prompt}
    if prompt == "instruction":
        for name in (n for n in ("input", "context") if n in row):
            context = _turn("user", row[name])["content"]
            if turns and context.strip():
                turns[-1]["content"] += "\n\n" + context
            columns.add(name)
    if response is None:
        return Conversation(turns, frozenset(columns))
    answer = _as_turns(row[response], "assistant")
    if prompt == "question":
        for turn in answer:
            turn["content"] = re.sub(r"<<[^<>]*>>", "", turn["content"])
    return Conversation(turns + answer, frozenset(columns), frozenset({response}))


def _as_turns(value: Any, role: str) -> list[Message]:
    return _turns(value) if isinstance(value, list) else [_turn(role, value)]


def _turns(value: Any) -> list[Message]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise RowError("messages is not a list of turns")
    return [
        _turn(turn.get("role", turn.get("from")), turn.get("content", turn.get("value")))
        for turn in value
    ]


def _turn(role: Any, content: Any) -> Message:
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise RowError(f"unknown role {role!r:.40}")
    if not isinstance(content, str | None):
        raise RowError("content is not text")
    text = content or ""
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise RowError("content is not valid Unicode")
    return {"role": ROLES[role.lower()], "content": text}


def _best_completion(completions: Any) -> list[Message]:
    """Assistant turn of the completion with the best score, the first one of equals."""
    if not isinstance(completions, list) or not all(isinstance(c, dict) for c in completions):
        raise RowError("completions is not a list of objects")
    if not completions:
        return []
    best = max(completions, key=lambda completion: _score(completion.get("fine-grained_score")))
    return [_turn("assistant", best.get("response"))]


def _score(value: Any) -> float:
    """The number, or -inf where there is none ("N/A" occurs)."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("-inf")


def _human_assistant(chosen: Any) -> list[Message]:
    if isinstance(chosen, list):
        return _turns(chosen)
    pieces = re.split(r"\n\n(Human|Assistant):", chosen) if isinstance(chosen, str) else [""]
    if len(pieces) == 1 or pieces[0].strip():
        raise RowError("chosen does not begin with 'Human:'")
    roles = ["user" if name == "Human" else "assistant" for name in pieces[1::2]]
    return [_turn(r, text.strip()) for r, text in zip(roles, pieces[2::2], strict=True)]


def _last(turns: list[Message], role: str) -> int | None:
    return max((i for i, turn in enumerate(turns) if turn["role"] == role), default=None)


def _require_user(prompt: list[Message]) -> list[Message]:
    last = _last(prompt, "user")
    if last is None:
        raise RowError("no user turn in the prompt")
    if not prompt[last]["content"].strip():
        raise RowError("empty prompt")
    return prompt
