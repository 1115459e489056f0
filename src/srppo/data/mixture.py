"""The rows of one source or of several, in the order that a seed gives."""

import heapq
import random
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from operator import itemgetter
from typing import NamedTuple

from srppo.data.files import Row, Rows
from srppo.data.schemas import Reading

Where = int | str
"""A row's number in its file, from 1; `file:number` where there are several files."""


class Record(NamedTuple):
    """A row, where it stands, how it is read, and the source that it is of."""

    where: Where
    row: Row
    read: Reading
    source: str


@dataclass(frozen=True)
class Part:
    """One source of a mixture: its files in order."""

    name: str
    files: list[tuple[str, Rows]]
    reading: Reading
    limit: int | None
    weight: float | None
    numbered: bool = True
    """A number says where a row is: it is the only file of all."""

    def __len__(self) -> int:
        total = sum(len(rows.rows) for _, rows in self.files)
        return total if self.limit is None else min(total, self.limit)

    @property
    def share(self) -> float:
        """What the part weighs; by default, its rows."""
        return self.weight or len(self)

    def where(self, label: str, number: int) -> Where:
        """Place of a row, as messages have it."""
        return number if self.numbered else f"{label}:{number}"

    def shuffled(self, seed: int) -> Iterator[Record]:
        """`limit` of its readable rows in an order that depends on `seed` and their count."""
        ends = list(accumulate(len(rows.rows) for _, rows in self.files))
        order = array("Q", range(ends[-1]))
        random.Random(seed).shuffle(order)
        for index in order[: self.limit]:
            which = bisect_right(ends, index)
            label, rows = self.files[which]
            place = index - (ends[which] - len(rows.rows))
            where = self.where(label, rows.numbers[place])
            yield Record(where, rows.rows[place], self.reading, self.name)

    def placed(self, seed: int) -> Iterator[tuple[float, Record]]:
        """`shuffled` with the place of each row in a mixture."""
        for k, record in enumerate(self.shuffled(seed)):
            yield (k + 0.5) / self.share, record


@dataclass(frozen=True)
class Source:
    """All that one setting names: a source, or a mixture of several."""

    name: str
    parts: list[Part]

    @property
    def count(self) -> int:
        """Rows of all files, unreadable ones included."""
        files = [rows for part in self.parts for _, rows in part.files]
        return sum(len(rows.rows) + len(rows.unreadable) for rows in files)

    def unreadable(self) -> Iterator[tuple[Where, str]]:
        """Place and reason of each row that could not be read."""
        for part in self.parts:
            for label, rows in part.files:
                for row in rows.unreadable:
                    yield part.where(label, row.number), row.reason

    def first_rows(self, n: int) -> Iterator[Row]:
        """A few rows of each file."""
        for part in self.parts:
            for _, rows in part.files:
                yield from (rows.rows[i] for i in range(min(n, len(rows.rows))))

    def shuffled(self, seed: int) -> Iterator[Record]:
        """The readable rows; any number of the first ones are mixed as the weights say, +-1 row.

        Row k of a part stands at (k + 1/2) / weight. With weights the mixture ends where the first
        part ends, so that no row comes twice; without, a part weighs what it has, and all end
        together.
        """
        parts = [part for part in self.parts if len(part)]
        if len(parts) == 1:
            yield from parts[0].shuffled(seed)
            return
        end = min((len(part) / part.share for part in parts), default=0)
        for place, record in heapq.merge(*(p.placed(seed) for p in parts), key=itemgetter(0)):
            if place > end:
                return
            yield record
