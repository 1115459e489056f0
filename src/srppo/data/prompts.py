"""Prompts for stage 2: everything up to the last user turn; no responses needed.

How prompts are kept apart from the demonstrations of the same source (`data.overlap=disjoint`):
with the same source and seed both loaders see the rows in the same order. `load_demonstrations`
looks at rows up to the last one that it needs (`Report.looked_at`); `load_prompts(skip=looked_at)`
passes over those very rows and goes on behind them. There, a prompt that equals one of a row passed
over, at any of its turns, is a duplicate. So no row and no prompt is in both.
"""

from array import array
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from srppo.data.chat import apply_template, is_default_template, prompt_ids, prompt_text
from srppo.data.demonstrations import prompt_key, require_length, user_text
from srppo.data.mixture import Record, Source
from srppo.data.reporting import SHOWN, Report, require_limits, shown
from srppo.data.schemas import Message, RowError, scalars, to_prompt
from srppo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Prompt", "load_prompts", "read_prompts"]


@dataclass(frozen=True)
class Prompt:
    """A prompt as token ids."""

    ids: list[int]
    text: str
    """What the ids spell: the filled-in template, up to where the response starts."""
    meta: dict[str, str | int | float | bool] = field(default_factory=dict)
    """The row's scalar columns that the prompt was not made of: group, a reference answer, ..."""
    user: str = ""
    """What users say in it: what overlap is measured on."""


def load_prompts(
    source: Source, tokenizer: "PreTrainedTokenizerBase", **settings: Any
) -> tuple[list[Prompt], Report]:
    """`read_prompts`, and DataError where no row can be used."""
    prompts, report = read_prompts(source, tokenizer, **settings)
    report.require_used("prompts", source)
    return prompts, report


def read_prompts(
    source: Source,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_prompt_tokens: int,
    limit: int | None,
    seed: int,
    skip: int = 0,
) -> tuple[list[Prompt], Report]:
    """The first `limit` usable prompts of `source` after a shuffle by `seed` and after `skip`.

    Reasons for leaving a row out are those of `demonstrations`, but for those about the response.
    A tokenizer without chat template is given the default one (`chat.apply_template`).

    Args:
        max_prompt_tokens: longer prompts are left out.
        skip: readable rows to pass over, see the top of this file.
    """
    require_limits(limit=limit, max_prompt_tokens=max_prompt_tokens)
    if skip < 0:
        raise DataError(f"skip={skip} rows cannot be passed over. Set skip to 0 or more.")
    apply_template(tokenizer)
    report = Report.start(source)
    report.template = "default" if is_default_template(tokenizer) else "own"
    screen = _Screen(tokenizer, max_prompt_tokens, report)
    prompts: list[Prompt] = []
    lengths = array("I")
    for record in source.shuffled(seed):
        if len(prompts) == limit:
            break
        if report.skipped < skip:
            screen.remember(record)
            report.skipped += 1
            continue
        try:
            prompts.append(screen(record))
        except RowError as error:
            report.leave_out(record, error)
            continue
        report.use(record)
        lengths.append(len(prompts[-1].ids))
        if len(report.first) < SHOWN:
            report.first.append(shown(tokenizer, record.where, prompts[-1].ids, []))
    report.finish(lengths)
    return prompts, report


class _Screen:
    """Decides row by row, in order, what is a prompt; remembers the prompts it has seen."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", max_prompt_tokens: int, report: Report
    ) -> None:
        self.tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.report = report
        self.seen: set[bytes] = set()

    def __call__(self, record: Record) -> Prompt:
        """The row as a prompt; RowError where it is none."""
        conversation = record.read(record.row)
        messages = to_prompt(conversation.turns)
        key = prompt_key(messages)
        if key in self.seen:
            raise RowError("duplicate")
        self.seen.add(key)
        ids = prompt_ids(self.tokenizer, messages)
        require_length(ids, self.max_prompt_tokens)
        schemas = self.report.schemas
        schemas[conversation.schema] = schemas.get(conversation.schema, 0) + 1
        meta = scalars(record.row, conversation.prompt_columns)
        return Prompt(ids, prompt_text(self.tokenizer, messages), meta, user_text(messages))

    def remember(self, record: Record) -> None:
        """Note all prompts of a row that is passed over: those of its turns, and its last."""
        with suppress(RowError):
            turns = record.read(record.row).turns
            for prompt in _prompts_within(turns):
                self.seen.add(prompt_key(prompt))


def _prompts_within(turns: list[Message]) -> list[list[Message]]:
    """What precedes each assistant turn, and what ends with the last user turn."""
    ends = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    ends += [i + 1 for i, turn in enumerate(turns) if turn["role"] == "user"]
    return [turns[:end] for end in ends]
