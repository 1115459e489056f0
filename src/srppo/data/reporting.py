"""What became of each row of a source: the counts that go into data.json."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import Any

from srppo.data.schemas import UNDERSTOOD
from srppo.data.sources import Rows
from srppo.errors import DataError

EXAMPLES_PER_REASON = 5


@dataclass
class Report:
    """Counts of rows: rows = used + skipped + not_needed + the sum of `dropped`."""

    source: str
    rows: int
    """Rows of the source, unreadable ones included."""
    used: int = 0
    skipped: int = 0
    """Rows passed over by `skip`, usable or not."""
    not_needed: int = 0
    """Rows never looked at, for `limit` was reached."""
    truncated: int = 0
    """Used rows whose response was cut."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> rows left out for it."""
    dropped_rows: dict[str, list[int]] = field(default_factory=dict)
    """Reason -> numbers of its first five rows in the source (from 1; lines of a JSONL file)."""
    prompt_tokens: dict[str, float] = field(default_factory=dict)
    """min, median, mean and max length of the prompts used."""
    response_tokens: dict[str, float] = field(default_factory=dict)
    """The same of the responses, EOS included; empty for prompts."""

    @classmethod
    def start(cls, source: str, rows: Rows) -> "Report":
        """A report in which the unreadable rows are counted already."""
        report = cls(source, rows=len(rows.rows) + len(rows.unreadable))
        for row in rows.unreadable:
            report.drop(row.reason, row.number)
        return report

    def drop(self, reason: str, number: int) -> None:
        """Count a row that is left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        numbers = self.dropped_rows.setdefault(reason, [])
        if len(numbers) < EXAMPLES_PER_REASON:
            numbers.append(number)

    def finish(
        self,
        kind: str,
        rows: Rows,
        *,
        prompt_lengths: Sequence[int],
        response_lengths: Sequence[int] = (),
    ) -> None:
        """Fill in what is known at the end.

        Raises:
            DataError: nothing is left.
        """
        self.used = len(prompt_lengths)
        self.not_needed = self.rows - self.used - self.skipped - sum(self.dropped.values())
        if not prompt_lengths:
            raise DataError(self._nothing_left(kind, rows))
        self.prompt_tokens = _lengths(prompt_lengths)
        self.response_tokens = _lengths(response_lengths)

    def to_json(self) -> dict[str, Any]:
        """All fields by name, ready for `json.dump`."""
        return asdict(self)

    def _nothing_left(self, kind: str, rows: Rows) -> str:
        if not self.rows:
            return f"{self.source}: holds no rows, so there are no {kind}. Give a source with rows."
        counts = [
            f"{count} x {reason} (rows {', '.join(map(str, self.dropped_rows[reason]))})"
            for reason, count in sorted(self.dropped.items(), key=lambda item: -item[1])
        ]
        if self.skipped:
            counts.insert(0, f"{self.skipped} x passed over by skip")
        first = [rows.rows[i] for i in range(min(100, len(rows.rows)))]
        columns = ", ".join(sorted({name for row in first for name in row})) or "none"
        return (
            f"{self.source}: none of its {self.rows} rows can be used as {kind}: "
            f"{'; '.join(counts)}. Columns found: {columns}. Columns understood: {UNDERSTOOD}. "
            f"{self._cure()}"
        )

    def _cure(self) -> str:
        most = max(self.dropped, key=lambda reason: self.dropped[reason], default="")
        if self.skipped and self.skipped >= sum(self.dropped.values()):
            return "Lower skip, or give a source with more rows."
        if most.startswith("prompt longer than"):
            return "Raise max_prompt_tokens."
        if most in ("columns not understood", "no assistant turn"):
            return "Rename the columns to a set that is understood and holds what is needed."
        return "Repair the rows named, or give another source."


def require_limits(**limits: int | None) -> None:
    """Raise DataError where a limit is below 1."""
    for name, value in limits.items():
        if value is not None and value < 1:
            raise DataError(f"{name}={value} leaves no rows to use. Set {name} to 1 or more.")


def _lengths(lengths: Sequence[int]) -> dict[str, float]:
    if not lengths:
        return {}
    return {
        "min": min(lengths),
        "median": median(lengths),
        "mean": fmean(lengths),
        "max": max(lengths),
    }
