"""Prompts for stage 2: everything up to the last user turn; no responses needed.

How demonstrations and prompts of one source are kept apart: with the same source, split, seed and
tokenizer both loaders see the rows in the same order. `load_demonstrations(limit=n)` takes rows up
to the n-th one that is usable as a demonstration. `load_prompts(skip=n)` passes over rows up to
that very row: while skipping, it counts with the same `DemonstrationScreen`, so rows that only one
of the two could use do not shift the border. Behind the border, a prompt that equals one of the
rows passed over is a duplicate. So no row and no prompt is in both, provided that max_prompt_tokens
here is not larger than it was there (a larger one could count rows that were left out there).
A source without any response has no demonstrations; there `skip` counts usable prompts.
"""

from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from srppo.data.chat import apply_template, prompt_ids, prompt_text
from srppo.data.demonstrations import DemonstrationScreen, Key, prompt_key, require_length
from srppo.data.reporting import Report, require_limits
from srppo.data.schemas import (
    Row,
    RowError,
    Rows,
    read_conversation,
    read_rows,
    scalars,
    to_messages,
    to_prompt,
)
from srppo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Prompt", "load_prompts"]


@dataclass(frozen=True)
class Prompt:
    """A prompt as token ids."""

    ids: list[int]
    text: str
    """What the ids spell: the filled-in template, up to where the response starts."""
    meta: dict[str, str | int | float | bool] = field(default_factory=dict)
    """The row's scalar columns that the prompt was not made of: group, a reference answer, ..."""


def load_prompts(
    source: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_prompt_tokens: int,
    limit: int | None,
    seed: int,
    split: str,
    skip: int = 0,
) -> tuple[list[Prompt], Report]:
    """The first `limit` usable prompts of `source` after a shuffle by `seed` and after `skip`.

    Reasons for leaving a row out are those of `demonstrations`, but for those about the response.
    A tokenizer without chat template is given the default one (`chat.apply_template`).

    Args:
        source: file, hub name or generator, see `sources`.
        max_prompt_tokens: longer prompts are left out.
        skip: pass over as many rows as `load_demonstrations(limit=skip)` takes from the same
            source (see the top of this file).

    Raises:
        DataError: the source cannot be read, or no row of it can be used.
        ModelError: the tokenizer has no EOS token, and `skip` needs one to count demonstrations.
    """
    require_limits(limit=limit, max_prompt_tokens=max_prompt_tokens)
    if skip < 0:
        raise DataError(f"skip={skip} rows cannot be passed over. Set skip to 0 or more.")
    apply_template(tokenizer)
    rows = read_rows(source, seed, split)
    report = Report.start(source, rows)
    screen = _PromptScreen(tokenizer, max_prompt_tokens)
    demonstrations = DemonstrationScreen(tokenizer, max_prompt_tokens)
    counted = demonstrations if skip and _has_responses(rows) else screen
    prompts: list[Prompt] = []
    for number, row in rows.shuffled(seed):
        if len(prompts) == limit:
            break
        if skip:
            skip -= _usable(counted, row)
            screen.remember(row)
            report.skipped += 1
            continue
        try:
            prompts.append(screen(row))
        except RowError as error:
            report.drop(str(error), number)
    report.finish("prompts", rows, prompt_lengths=[len(prompt.ids) for prompt in prompts])
    return prompts, report


class _PromptScreen:
    """Decides row by row, in order, what is a prompt; remembers the prompts it has seen."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", max_prompt_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.seen: set[Key] = set()

    def __call__(self, row: Row) -> Prompt:
        """The row as a prompt; RowError where it is none."""
        messages = to_prompt(row)
        key = prompt_key(messages)
        if key in self.seen:
            raise RowError("duplicate")
        self.seen.add(key)
        ids = prompt_ids(self.tokenizer, messages)
        require_length(ids, self.max_prompt_tokens)
        meta = scalars(row, read_conversation(row).prompt_columns)
        return Prompt(ids, prompt_text(self.tokenizer, messages), meta)

    def remember(self, row: Row) -> None:
        """Note the prompts of a skipped row, as prompt and as demonstration."""
        with suppress(RowError):  # a row without the one may have the other
            self.seen.add(prompt_key(to_prompt(row)))
        with suppress(RowError):
            self.seen.add(prompt_key(to_messages(row)[0]))


def _usable(screen: DemonstrationScreen | _PromptScreen, row: Row) -> bool:
    try:
        screen(row)
    except RowError:
        return False
    return True


def _has_responses(rows: Rows) -> bool:
    """Whether any row has a response, so that demonstrations can be made of the source."""
    for row in rows.rows:
        with suppress(RowError):
            to_messages(row)
            return True
    return False
