"""The recipe's settings of the data: where rows come from, and what becomes of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, field_serializer, field_validator, model_validator

from srppo.validation import NonNegative, Positive, PositiveFloat, Section

COLUMNS = (
    *("messages", "conversations", "system", "prompt", "response", "completion", "completions"),
    *("instruction", "input", "output", "context", "question", "answer", "chosen"),
)
"""Names that a column map can map to."""


def _known(columns: dict[str, str]) -> dict[str, str]:
    if unknown := sorted(columns.keys() - set(COLUMNS)):
        raise ValueError(
            f"columns maps to {unknown[0]!r}, which no set of columns has: it would have no "
            f"effect. Write KNOWN: OWN, where KNOWN is one of {', '.join(COLUMNS)}."
        )
    return columns


ColumnMap = Annotated[dict[str, str], AfterValidator(_known)]


class SourceConfig(Section):
    """One source of rows. A plain string in its place is `source`, all else at its default."""

    source: str
    """A preset, file, directory, glob, hub name or generator: see docs/data.md."""
    split: str | None = None
    """Split of this source; null: `data.split`."""
    columns: ColumnMap | None = None
    """Known name: the source's own column, as `{prompt: Question}`; null: `data.columns`."""
    limit: Positive | None = None
    """Use at most this many rows of it, drawn by seed; null: all."""
    weight: PositiveFloat | None = None
    """Its share of a mixture; null, for all of them: every row of every source."""
    stream: bool = False
    """Hub only: draw `limit` rows from the first ones, without downloading the whole set."""

    @model_validator(mode="after")
    def _possible(self) -> SourceConfig:
        if self.stream and self.limit is None:
            raise ValueError(
                f"{self.source}: stream=true without limit: a stream has no end to wait for. "
                "Set limit to the rows that you want."
            )
        return self


class DataConfig(Section):
    """Where demonstrations and prompts come from.

    A source is a preset such as `tulu-v2-mix`, a file (.jsonl, .json, .csv, .parquet, .arrow), a
    directory, a glob, a Hugging Face name `owner/name:config@revision`,
    `python:package.module:function`, a generator called with `seed` and `split`; or a list of
    these, each with weight and limit. docs/data.md has it all.
    """

    demonstrations: list[SourceConfig] | None = None
    """Prompt-response pairs for stage 1."""
    demonstrations_limit: Positive | None = None
    """Train on this many conversations of them, drawn by seed; null: all."""
    assistant_turns: Literal["all", "last"] = "all"
    """Which turns of a conversation have loss: each is a demonstration, what precedes its prompt.
    Stage 2 always starts from the last user turn."""
    held_out: NonNegative = 128
    """Conversations kept out of training for the audit and the held-out NLL: what
    demonstrations_limit leaves, or else a tenth of them at most; of a prompt, all or none."""
    overlap: Literal["same", "disjoint", "other"] | None = None
    """Prompts of stage 2: `same` as stage 1 trains on; `disjoint`, others of the same set; `other`,
    those of `prompts`. null: `other` if `prompts` is set, else `same`."""
    prompts: list[SourceConfig] | None = None
    """Prompts for stage 2, if they are of another set."""
    prompts_limit: Positive | None = None
    """Use this many of them; null: all."""
    split: str = "train"
    """Split of the sources above; files that are named themselves have none."""
    columns: ColumnMap = {}
    """Known name: own column, as `{prompt: Question}`, for the sources above; empty: recognised."""
    max_prompt_tokens: Positive = 1024
    """Longer prompts are dropped, and counted."""
    max_response_tokens: Positive = 1024
    """Longer demonstrations are truncated; rollouts and evaluation stop here."""

    @field_validator("demonstrations", "prompts", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        sources = value if isinstance(value, list | None) else [value]
        return sources and [{"source": s} if isinstance(s, str) else s for s in sources]

    @field_validator("demonstrations", "prompts")
    @classmethod
    def _mixable(cls, sources: list[SourceConfig] | None) -> list[SourceConfig] | None:
        if sources == []:
            raise ValueError("an empty list of sources holds no rows. Name one, or write null.")
        if sources and 0 < sum(s.weight is None for s in sources) < len(sources):
            without = next(s.source for s in sources if s.weight is None)
            raise ValueError(
                f"{without} has no weight and others of the mixture have one: its share is not "
                "defined. Give all of them a weight, or none."
            )
        return sources

    @field_serializer("demonstrations", "prompts")
    def _short(self, sources: list[SourceConfig] | None) -> Any:
        if sources is None:
            return None
        short = [s.model_dump(exclude_defaults=True) for s in sources]
        plain = [s["source"] if len(s) == 1 else s for s in short]
        return plain[0] if len(plain) == 1 else plain

    @model_validator(mode="after")
    def _possible(self) -> DataConfig:
        if self.overlap in ("same", "disjoint") and self.prompts:
            raise ValueError(
                f"overlap={self.overlap} takes the prompts from data.demonstrations, and "
                "data.prompts is set, too. Set data.prompts=null or data.overlap=other."
            )
        if self.overlap == "other" and not self.prompts:
            raise ValueError(
                "overlap=other without data.prompts: there is no other set. Set data.prompts, or "
                "data.overlap=disjoint for other prompts of the same set."
            )
        if self.overlap in ("same", "disjoint") and not self.demonstrations:
            raise ValueError(
                f"overlap={self.overlap} takes the prompts from data.demonstrations, and those are "
                "not set. Set data.demonstrations, or data.prompts."
            )
        if self.overlap == "disjoint" and self.demonstrations_limit is None:
            raise ValueError(
                "overlap=disjoint with demonstrations_limit=null: stage 1 takes every row and "
                "leaves no prompts. Set data.demonstrations_limit."
            )
        return self

    @property
    def stage_2_prompts(self) -> str:
        """`overlap`, resolved."""
        return self.overlap or ("other" if self.prompts else "same")
