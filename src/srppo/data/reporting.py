"""What became of each row of a source: the counts that go into data.json."""

from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from srppo.data.mixture import Record, Source, Where
from srppo.data.schemas import UNDERSTOOD, RowError
from srppo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACES_PER_REASON = 100
"""Rows named in data.json for each reason; `srppo data check --dropped FILE` names all."""
SHOWN = 3
"""First examples that are kept, token by token."""
LONGEST_CHARACTER = 4
"""Bytes, and so tokens, that one character can take in UTF-8."""
HEAD, TAIL = 120, 60
"""Tokens kept at either end of a prompt or a response that is longer than both."""


@dataclass
class Report:
    """Counts of rows: rows = used + skipped + not_needed + the sum of `dropped`."""

    source: str
    rows: int
    """Rows of the source, unreadable ones included."""
    unreadable: int = 0
    """Rows that are no rows: not UTF-8, not JSON, no object; `dropped` has them by reason."""
    used: int = 0
    used_of: dict[str, int] = field(default_factory=dict)
    """Source -> rows used of it, for each of a mixture of which rows were looked at."""
    skipped: int = 0
    """Rows passed over by `skip`, usable or not."""
    not_needed: int = 0
    """Rows never looked at: `limit` was reached, or a mixture's first source was at its end."""
    examples: int = 0
    """Demonstrations: one per assistant turn with loss. Prompts: one per row."""
    truncated: int = 0
    """Responses that were cut."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> rows left out for it."""
    dropped_rows: dict[str, list[Where]] = field(default_factory=dict)
    """Reason -> its rows in the source (from 1; lines of a text file)."""
    turns_dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> assistant turns without loss, in rows that are used for their other turns."""
    schemas: dict[str, int] = field(default_factory=dict)
    """Columns -> rows used that were read so."""
    template: str = ""
    """`own`: the tokenizer's chat template; `default`: srppo's, for it has none."""
    prompt_tokens: dict[str, Any] = field(default_factory=dict)
    """min, median, mean and max length of the prompts used; bars: [from, to, prompts] each, two
    to a doubling."""
    response_tokens: dict[str, Any] = field(default_factory=dict)
    """The same of the responses, EOS included; empty for prompts."""
    first: list[dict[str, Any]] = field(default_factory=list)
    """The first examples: row, prompt and response (trained on) as one text per token."""

    @classmethod
    def start(cls, source: Source) -> "Report":
        """A report in which the unreadable rows are counted already."""
        report = cls(source.name, rows=source.count)
        for where, reason in source.unreadable():
            report.drop(reason, where)
            report.unreadable += 1
        return report

    @property
    def looked_at(self) -> int:
        """Readable rows up to the last one that was needed; what `load_prompts` may skip."""
        return self.used + sum(self.dropped.values()) - self.unreadable

    def drop(self, reason: str, where: Where) -> None:
        """Count a row that is left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.dropped_rows.setdefault(reason, []).append(where)

    def leave_out(self, record: Record, error: RowError) -> None:
        """Count a row that was looked at and cannot be used."""
        self.used_of.setdefault(record.source, 0)
        self.drop(str(error), record.where)

    def use(self, record: Record) -> None:
        """Count a row that is used."""
        self.used += 1
        self.used_of[record.source] = self.used_of.get(record.source, 0) + 1

    def finish(self, prompts: "array[int]", responses: "array[int] | tuple[()]" = ()) -> None:
        """Fill in what is known at the end, from the lengths of the examples in tokens."""
        self.examples = len(prompts)
        self.dropped_rows = {r: sorted_places(places) for r, places in self.dropped_rows.items()}
        self.not_needed = self.rows - self.used - self.skipped - sum(self.dropped.values())
        self.prompt_tokens = _lengths(prompts)
        self.response_tokens = _lengths(responses)

    def require_used(self, kind: str, source: Source) -> None:
        """Raise DataError where nothing is left, at all or of a source of a mixture."""
        if not self.used:
            raise DataError(self._nothing_left(kind, source))
        for part in source.parts:
            if self.used_of.get(part.name) == 0:
                labels = {label for label, _ in part.files}
                raise DataError(
                    f"{part.name}: none of its rows that were looked at can be used as {kind}: "
                    f"{self._counts(labels)}, so the mixture would be one without it. Mend the "
                    "source, say which of its columns are meant (its own `columns`), or leave it "
                    "out."
                )

    def to_json(self) -> dict[str, Any]:
        """All fields by name, ready for `json.dump`; of the dropped rows the first hundred."""
        rows = {r: places[:PLACES_PER_REASON] for r, places in self.dropped_rows.items()}
        return asdict(self) | {"dropped_rows": rows}

    def _nothing_left(self, kind: str, source: Source) -> str:
        if not self.rows:
            return f"{self.source}: holds no rows, so there are no {kind}. Give a source with rows."
        counts = self._counts()
        if self.skipped:
            counts = f"{self.skipped} x passed over; {counts}"
        columns = ", ".join(sorted({name for row in source.first_rows(100) for name in row}))
        return (
            f"{self.source}: none of its {self.rows} rows can be used as {kind}: "
            f"{counts}. Columns found: {columns or 'none'}. "
            f"Columns understood: {UNDERSTOOD}. {self._cure(columns)}"
        )

    def _counts(self, labels: set[str] | None = None) -> str:
        """Rows left out by reason, most first; of some files of a mixture, or of all."""
        found = {
            reason: [w for w in places if labels is None or str(w).rpartition(":")[0] in labels]
            for reason, places in self.dropped_rows.items()
        }
        return "; ".join(
            f"{len(places)} x {reason} (rows {', '.join(map(str, places[:5]))})"
            for reason, places in sorted(found.items(), key=lambda item: -len(item[1]))
            if places
        )

    def _cure(self, columns: str) -> str:
        most = max(self.dropped, key=lambda reason: self.dropped[reason], default="")
        if self.skipped and self.skipped >= sum(self.dropped.values()):
            return "Lower data.demonstrations_limit, or give a source with more rows."
        if most.startswith("prompt longer than"):
            return "Raise data.max_prompt_tokens (--max-prompt-tokens of `srppo data check`)."
        if most.startswith("refused by the chat template"):
            return "Give the tokenizer a chat template that takes such conversations."
        if most == "not UTF-8":
            return "Save the file as UTF-8."
        if most.startswith(("columns not understood", "no column", "no response column")):
            if any(mark in columns for mark in ";\t|"):
                return "Save the table with commas between its columns."
            return (
                "Say which of its columns are meant: data.columns={prompt: OWN, response: OWN}, or "
                "--column-map prompt=OWN."
            )
        return "Repair the rows named, or give another source."


def sorted_places(places: Iterable[Where]) -> list[Where]:
    """Row numbers in order; `file:number` by file, then number."""

    def key(where: Where) -> tuple[str, int]:
        if isinstance(where, int):
            return "", where
        name, _, number = where.rpartition(":")
        return name, int(number)

    return sorted(places, key=key)


def shown(
    tokenizer: "PreTrainedTokenizerBase", where: Where, prompt: list[int], response: list[int]
) -> dict[str, Any]:
    """An example as the model sees it, one text per token."""
    texts = token_texts(tokenizer, prompt + response)
    return {
        "row": where,
        "prompt": _ends(texts[: len(prompt)]),
        "response": _ends(texts[len(prompt) :]),
    }


def token_texts(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> list[str]:
    """What each token adds to the text; those of an unfinished character add nothing."""
    texts: list[str] = []
    start = done = 0  # a piece is read after the one before it, which decides about spaces

    def decoded(end: int) -> str:
        return str(tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False))

    for end in range(1, len(ids) + 1):
        text = decoded(end)
        if text.endswith("\ufffd") and end < min(len(ids), done + LONGEST_CHARACTER):
            texts.append("")
            continue
        texts.append(text[len(decoded(done)) :])
        start, done = done, end
    return texts


def require_limits(**limits: int | None) -> None:
    """Raise DataError where a limit is below 1."""
    for name, value in limits.items():
        if value is not None and value < 1:
            raise DataError(f"{name}={value} leaves no rows to use. Set {name} to 1 or more.")


def _ends(texts: list[str]) -> list[str]:
    if len(texts) <= HEAD + TAIL:
        return texts
    return [*texts[:HEAD], f" … {len(texts) - HEAD - TAIL} tokens … ", *texts[-TAIL:]]


def _lengths(lengths: Sequence[int]) -> dict[str, Any]:
    if not lengths:
        return {}
    edges = [round(2 ** (k / 2)) for k in range(2 * max(lengths).bit_length() + 2)]
    counts = Counter(bisect_right(edges, length) for length in lengths)
    filled = range(min(counts), max(counts) + 1)
    return {
        "min": min(lengths),
        "median": median(lengths),
        "mean": fmean(lengths),
        "max": max(lengths),
        "bars": [[edges[k - 1], edges[k] - 1, counts[k]] for k in filled],
    }
