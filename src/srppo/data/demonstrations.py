"""Demonstrations: rows of any known schema as token ids, each row that is left out counted.

The response is the last assistant turn, the prompt everything before it. A row is left out for
one of these reasons, and `Report` counts them:

| reason | what it means | hits prompts too |
|---|---|---|
| not UTF-8 · not JSON · not an object · more cells than columns | the row cannot be read | yes |
| columns not understood | none of the known sets of columns (see `schemas`) | yes |
| messages is not a list of turns · completions is not a list of objects | malformed | yes |
| chosen does not begin with 'Human:' | a string that is not hh-rlhf's | yes |
| content is not text · content is not valid Unicode | number, list or lone surrogate | yes |
| unknown role '...' | neither system, user, assistant, nor human, gpt | yes |
| empty messages | no turn at all | yes |
| no assistant turn · empty response | nothing to learn; null and blanks are empty | no |
| no user turn in the prompt · empty prompt | nothing to answer | yes |
| refused by the chat template (...) | for instance: roles must alternate | yes |
| text that the tokenizer can only spell with control tokens | see `chat` | yes |
| duplicate | the same prompt and response (prompts: the same prompt) came before | yes |
| prompt longer than N tokens | never cut: a cut prompt asks something else | yes |

A response longer than `max_response_tokens`, EOS included, is used but cut, and counted as
truncated: it has no EOS, for it did not end there. A user turn after the last assistant turn has
no answer; it is left out of the demonstration, and ends the *prompt* that `load_prompts` makes.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from srppo.data.chat import Example, apply_template, encode, require_eos
from srppo.data.reporting import Report, require_limits
from srppo.data.schemas import (
    Message,
    Row,
    RowError,
    read_conversation,
    read_rows,
    scalars,
    to_messages,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DemonstrationScreen", "Example", "Report", "load_demonstrations", "prompt_key"]

Key = tuple[tuple[str, str], ...]


def load_demonstrations(
    source: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_prompt_tokens: int,
    max_response_tokens: int,
    limit: int | None,
    seed: int,
    split: str,
) -> tuple[list[Example], Report]:
    """The first `limit` usable rows of `source` after a shuffle by `seed`; all rows if None.

    The same source, split and seed give the same order, so a smaller limit is a prefix of a larger
    one. A tokenizer without chat template is given the default one (`chat.apply_template`).

    Args:
        source: file, hub name or generator, see `sources`.
        max_prompt_tokens: longer prompts are left out.
        max_response_tokens: longer responses are cut; EOS counts.

    Raises:
        DataError: the source cannot be read, or no row of it can be used.
        ModelError: the tokenizer has no EOS token.
    """
    require_limits(limit=limit, max_prompt_tokens=max_prompt_tokens)
    require_limits(max_response_tokens=max_response_tokens)
    require_eos(tokenizer)
    apply_template(tokenizer)
    rows = read_rows(source, seed, split)
    report = Report.start(source, rows)
    screen = DemonstrationScreen(tokenizer, max_prompt_tokens)
    examples: list[Example] = []
    for number, row in rows.shuffled(seed):
        if len(examples) == limit:
            break
        try:
            example = screen(row)
        except RowError as error:
            report.drop(str(error), number)
            continue
        if len(example.response_ids) > max_response_tokens:
            example = replace(example, response_ids=example.response_ids[:max_response_tokens])
            report.truncated += 1
        examples.append(example)
    report.finish(
        "demonstrations",
        rows,
        prompt_lengths=[len(example.prompt_ids) for example in examples],
        response_lengths=[len(example.response_ids) for example in examples],
    )
    return examples, report


class DemonstrationScreen:
    """Decides row by row, in order, what is a demonstration; remembers what it has seen.

    `load_prompts` passes its skipped rows through one of these, so that both count alike.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", max_prompt_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.seen: set[tuple[Key, str]] = set()

    def __call__(self, row: Row) -> Example:
        """The row as a demonstration of full length.

        Raises:
            RowError: it is none; the message is the reason.
        """
        prompt, response = to_messages(row)
        key = (prompt_key(prompt), response.strip())
        if key in self.seen:
            raise RowError("duplicate")
        self.seen.add(key)
        example = encode(self.tokenizer, prompt, response)
        require_length(example.prompt_ids, self.max_prompt_tokens)
        conversation = read_conversation(row)
        used = conversation.prompt_columns | conversation.response_columns
        return replace(example, meta=scalars(row, used))


def prompt_key(messages: list[Message]) -> Key:
    """What makes two prompts the same: roles and contents, but for outer blanks."""
    return tuple((message["role"], message["content"].strip()) for message in messages)


def require_length(prompt_ids: list[int], max_prompt_tokens: int) -> None:
    """Raise RowError where the prompt is too long."""
    if len(prompt_ids) > max_prompt_tokens:
        raise RowError(f"prompt longer than {max_prompt_tokens} tokens")
