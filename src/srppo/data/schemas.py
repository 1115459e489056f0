"""What the columns of a row mean: any known row becomes a list of turns.

| columns | data sets | turns |
|---|---|---|
| messages, or conversations | TULU, UltraChat, ShareGPT | the turns; role/content or from/value |
| instruction + completions | UltraFeedback | completion of the best `fine-grained_score` |
| prompt + response, or completion | TRL | two turns; each may itself be a list of turns |
| instruction (+ input) + output | Alpaca | input after a blank line, unless empty |
| instruction (+ context) + response | Dolly | likewise |
| question + answer | GSM8K | calculator marks `<<2+2=4>>` are taken out of the answer |
| chosen | hh-rlhf | "Human:"/"Assistant:" in one string, or a list of turns |
| prompt, instruction or question alone | IFEval | one user turn: good for prompts only |

The first line that fits counts. Roles human and gpt are read as user and assistant. A column
`system` beside any of them but lists of turns is the system turn, unless empty.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from srppo.data.files import Row
from srppo.errors import DataError

Message = dict[str, str]
"""One turn: role (system, user or assistant) and content."""

UNDERSTOOD = (
    "messages, conversations, prompt/response, prompt/completion, instruction/completions, "
    "instruction/input/output, instruction/context/response, question/answer, chosen"
)
ALONE = ("prompt", "instruction", "question")
"""Columns that hold a prompt where no column with a response is beside them."""
ROLES = {r: r for r in ("system", "user", "assistant")} | {"human": "user", "gpt": "assistant"}


class RowError(DataError):
    """A row that cannot be used; the message is the reason that it is counted under."""


@dataclass(frozen=True)
class Conversation:
    """The turns of a row, and which of its columns they came from."""

    turns: list[Message]
    schema: str
    prompt_columns: frozenset[str]
    response_columns: frozenset[str] = frozenset()

    @property
    def columns(self) -> frozenset[str]:
        """All that the turns came from."""
        return self.prompt_columns | self.response_columns

    def require_response(self) -> None:
        """Raises RowError where there is no column for it beside those of the prompt."""
        if self.schema in ALONE and all(turn["role"] != "assistant" for turn in self.turns):
            beside = ", ".join(sorted(self.prompt_columns))
            raise RowError(f"no response column beside {beside}")


@dataclass(frozen=True)
class Reading:
    """How the rows of a source are read: by recognition, unless something is given."""

    schema: str | None = None
    """A key of SCHEMAS; None: the first one whose columns a row has."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Known name -> the source's own column. Only these columns are then looked at."""

    def __call__(self, row: Row) -> Conversation:
        """The turns of a row; roles mapped, null content read as empty.

        Raises:
            RowError: the columns are not understood, or a turn is malformed.
        """
        if not self.columns:
            return _read(row, self.schema)
        for own in self.columns.values():
            if own not in row:
                raise RowError(f"no column {own!r}")
        found = _read({known: row[own] for known, own in self.columns.items()}, self.schema)
        return Conversation(
            found.turns,
            found.schema,
            frozenset(self.columns[known] for known in found.prompt_columns),
            frozenset(self.columns[known] for known in found.response_columns),
        )


def answered(turns: list[Message], which: str = "last") -> tuple[list[int], list[str]]:
    """Places of the assistant turns that can be learnt, and why the others cannot.

    Args:
        which: `all` assistant turns are looked at, or the `last`.

    Raises:
        RowError: there is none; the message is the reason, that of the last assistant turn.
    """
    places = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not places:
        raise RowError("no assistant turn" if turns else "empty messages")
    found: list[int] = []
    problems: list[str] = []
    for i in places[-1:] if which == "last" else places:
        empty = "" if turns[i]["content"].strip() else "empty response"
        if problem := empty or _prompt_problem(turns[:i]):
            problems.append(problem)
        else:
            found.append(i)
    if not found:
        raise RowError(problems[-1])
    return found, problems


def to_prompt(turns: list[Message]) -> list[Message]:
    """Everything up to the last user turn, whether an answer follows or not.

    Raises:
        RowError: there is no user turn, or it is empty.
    """
    if not turns:
        raise RowError("empty messages")
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=-1)
    if problem := _prompt_problem(turns[: last + 1]):
        raise RowError(problem)
    return turns[: last + 1]


def scalars(row: Row, used: frozenset[str]) -> dict[str, str | int | float | bool]:
    """The columns of a row that are not `used` and hold a str, int, float or bool."""
    return {k: v for k, v in row.items() if k not in used and isinstance(v, str | int | float)}


def _prompt_problem(prompt: list[Message]) -> str:
    users = [turn["content"] for turn in prompt if turn["role"] == "user"]
    if not users:
        return "no user turn in the prompt"
    return "" if users[-1].strip() else "empty prompt"


def _read(row: Row, schema: str | None) -> Conversation:
    if schema is not None:
        columns, read = SCHEMAS[schema]
        if missing := [name for name in columns if name not in row]:
            raise RowError(f"no column {missing[0]!r}")
        return read(row, schema)
    for name, (columns, read) in SCHEMAS.items():
        if all(column in row for column in columns):
            return read(row, name)
    raise RowError("columns not understood")


def _list_of_turns(row: Row, schema: str) -> Conversation:
    return Conversation(_turns(row[schema]), schema, frozenset({schema}))


def _ultrafeedback(row: Row, schema: str) -> Conversation:
    turns, columns = _prompt(row, "instruction")
    turns += _best_completion(row["completions"])
    return Conversation(turns, schema, columns, frozenset({"completions"}))


def _chosen(row: Row, schema: str) -> Conversation:
    return Conversation(_human_assistant(row["chosen"]), schema, frozenset({"chosen"}))


def _pair(row: Row, schema: str) -> Conversation:
    prompt, _, response = schema.partition(" + ")
    turns, columns = _prompt(row, prompt)
    if not response:
        return Conversation(turns, schema, columns)
    answer = _as_turns(row[response], "assistant")
    if prompt == "question":
        for turn in answer:
            turn["content"] = re.sub(r"<<[^<>]*>>", "", turn["content"])
    return Conversation(turns + answer, schema, columns, frozenset({response}))


def _prompt(row: Row, prompt: str) -> tuple[list[Message], frozenset[str]]:
    """The turns before the answer, and the columns that they came from."""
    turns = _as_turns(row[prompt], "user")
    columns = {prompt}
    if prompt == "instruction":
        for name in (n for n in ("input", "context") if n in row):
            context = _turn("user", row[name])["content"]
            if turns and context.strip():
                turns[-1]["content"] += "\n\n" + context
            columns.add(name)
    if "system" in row:
        columns.add("system")
        system = _turn("system", row["system"])
        turns = [system] * bool(system["content"].strip()) + turns
    return turns, frozenset(columns)


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
        score = float(value)
    except (TypeError, ValueError, OverflowError):
        return -math.inf
    return -math.inf if math.isnan(score) else score


def _human_assistant(chosen: Any) -> list[Message]:
    if isinstance(chosen, list):
        return _turns(chosen)
    pieces = re.split(r"\n\n(Human|Assistant):", chosen) if isinstance(chosen, str) else [""]
    if len(pieces) == 1 or pieces[0].strip():
        raise RowError("chosen does not begin with 'Human:'")
    roles = ["user" if name == "Human" else "assistant" for name in pieces[1::2]]
    return [_turn(r, text.strip()) for r, text in zip(roles, pieces[2::2], strict=True)]


SCHEMAS: dict[str, tuple[tuple[str, ...], Callable[[Row, str], Conversation]]] = {
    "messages": (("messages",), _list_of_turns),
    "conversations": (("conversations",), _list_of_turns),
    "instruction + completions": (("instruction", "completions"), _ultrafeedback),
    **{
        pair: (tuple(pair.split(" + ")), _pair)
        for pair in (
            *("prompt + response", "prompt + completion", "instruction + output"),
            *("instruction + response", "question + answer"),
        )
    },
    "chosen": (("chosen",), _chosen),
    **{prompt: ((prompt,), _pair) for prompt in ALONE},
}
"""Name: the columns that a row must have, and what reads it; the first that fits counts."""
