"""Demonstrations: rows of any known schema as token ids, each row that is left out counted.

Each assistant turn of a conversation, or the last alone, is one demonstration: the turn is the
response, everything before it the prompt. So the loss is on all assistant turns, each scored after
the very ids that a rollout would start from, and every mask is a length. (One sequence per
conversation with a mask per token would spare the repeated prefixes, but its earlier turns follow
ids that the template never gives a rollout: its closing newline, a dropped thought, a cut.)

A row is left out for one of these reasons, and `Report` counts them:

| reason | what it means | hits prompts too |
|---|---|---|
| not UTF-8 · not JSON · not an object · more cells than columns | the row cannot be read | yes |
| columns not understood | none of the known sets of columns (see `schemas`) | yes |
| no column '...' | one that the preset or the column map names | yes |
| messages is not a list of turns · completions is not a list of objects | malformed | yes |
| chosen does not begin with 'Human:' | a string that is not hh-rlhf's | yes |
| content is not text · content is not valid Unicode | number, list or lone surrogate | yes |
| unknown role '...' | neither system, user, assistant, nor human, gpt | yes |
| empty messages | no turn at all | yes |
| no assistant turn · empty response | nothing to learn; null and blanks are empty | no |
| no response column beside ... | a prompt's column alone | no |
| no user turn in the prompt · empty prompt | nothing to answer | yes |
| refused by the chat template (...) | for instance: roles must alternate | yes |
| text that the tokenizer can only spell with control tokens | see `chat` | yes |
| duplicate | the same prompt and response (prompts: the same prompt) came before | yes |
| prompt longer than N tokens | never cut: a cut prompt asks something else | yes |

Of a conversation with several turns, only those that cannot be used are left out, and counted as
turns; the reasons are those above, and a row without any other turn is dropped for the last one's.
A response longer than `max_response_tokens`, EOS included, is used but cut, and counted as
truncated: it has no EOS, for it did not end there. A user turn after the last assistant turn has
no answer; it is left out of the demonstration, and ends the *prompt* that `load_prompts` makes.
"""

from array import array
from dataclasses import replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from srppo.data.chat import Example, apply_template, encode, is_default_template, require_eos
from srppo.data.mixture import Record, Source
from srppo.data.reporting import SHOWN, Report, require_limits, shown
from srppo.data.schemas import Message, RowError, answered, scalars
from srppo.data.store import OnDisk

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Example", "Report", "load_demonstrations", "prompt_key", "read_demonstrations"]


def load_demonstrations(
    source: Source, tokenizer: "PreTrainedTokenizerBase", **settings: Any
) -> tuple[OnDisk[Example], Report]:
    """`read_demonstrations`, and DataError where no row can be used."""
    examples, report = read_demonstrations(source, tokenizer, **settings)
    report.require_used("demonstrations", source)
    return examples, report


def read_demonstrations(
    source: Source,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_prompt_tokens: int,
    max_response_tokens: int,
    limit: int | None,
    seed: int,
    turns: str = "all",
) -> tuple[OnDisk[Example], Report]:
    """Demonstrations of the first `limit` usable rows after a shuffle by `seed`; of all if None.

    The same source and seed give the same order, so a smaller limit is a prefix of a larger one.
    A tokenizer without chat template is given the default one (`chat.apply_template`).

    Args:
        max_prompt_tokens: turns with longer prompts are left out.
        max_response_tokens: longer responses are cut; EOS counts.
        turns: `all` assistant turns, or the `last`.

    Raises:
        ModelError: the tokenizer has no EOS token.
    """
    require_limits(limit=limit, max_prompt_tokens=max_prompt_tokens)
    require_limits(max_response_tokens=max_response_tokens)
    require_eos(tokenizer)
    apply_template(tokenizer)
    report = Report.start(source)
    report.template = "default" if is_default_template(tokenizer) else "own"
    screen = _Screen(tokenizer, max_prompt_tokens, turns, report)
    examples: OnDisk[Example] = OnDisk()
    prompts, responses = array("I"), array("I")
    for record in source.shuffled(seed):
        if report.used == limit:
            break
        try:
            found = screen(record)
        except RowError as error:
            report.leave_out(record, error)
            continue
        report.use(record)
        for example in found:
            if len(example.response_ids) > max_response_tokens:
                example = replace(example, response_ids=example.response_ids[:max_response_tokens])
                report.truncated += 1
            examples.append(example)
            prompts.append(len(example.prompt_ids))
            responses.append(len(example.response_ids))
            if len(report.first) < SHOWN:
                ids = example.prompt_ids, example.response_ids
                report.first.append(shown(tokenizer, record.where, *ids))
    report.finish(prompts, responses)
    return examples, report


class _Screen:
    """Decides row by row, in order, what is a demonstration; remembers what it has seen."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        max_prompt_tokens: int,
        turns: str,
        report: Report,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.turns = turns
        self.report = report
        self.seen: set[bytes] = set()

    def __call__(self, record: Record) -> list[Example]:
        """The row's demonstrations, responses at full length.

        Raises:
            RowError: it has none; the message is the reason.
        """
        conversation = record.read(record.row)
        conversation.require_response()
        turns = conversation.turns
        places, problems = answered(turns, self.turns)
        key = prompt_key(turns[: places[-1] + 1])
        if key in self.seen:
            raise RowError("duplicate")
        self.seen.add(key)
        meta = scalars(record.row, conversation.columns)
        found: list[Example] = []
        for i in places:
            try:
                example = encode(self.tokenizer, turns[:i], turns[i]["content"])
                require_length(example.prompt_ids, self.max_prompt_tokens)
                found.append(replace(example, meta=meta, user=user_text(turns[:i])))
            except RowError as error:
                problems.append(str(error))
        if not found:
            raise RowError(problems[-1])
        for problem in problems:
            self.report.turns_dropped[problem] = self.report.turns_dropped.get(problem, 0) + 1
        schemas = self.report.schemas
        schemas[conversation.schema] = schemas.get(conversation.schema, 0) + 1
        return [replace(e, final=e is found[-1]) for e in found]


def prompt_key(messages: list[Message]) -> bytes:
    """What makes two prompts the same: a hash of roles and contents, but for outer blanks."""
    turns = [(message["role"], message["content"].strip()) for message in messages]
    return blake2b(repr(turns).encode(), digest_size=16).digest()


def user_text(messages: list[Message]) -> str:
    """What users say in a prompt: what overlap is measured on."""
    return "\n".join(message["content"] for message in messages if message["role"] == "user")


def require_length(prompt_ids: list[int], max_prompt_tokens: int) -> None:
    """Raise RowError where the prompt is too long."""
    if len(prompt_ids) > max_prompt_tokens:
        raise RowError(f"prompt longer than {max_prompt_tokens} tokens")
