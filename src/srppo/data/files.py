"""Local files as rows; an unreadable row is kept as such, with its line, and harms no other.

| file | numbers of rows | in memory |
|---|---|---|
| .jsonl | lines | the places of the lines |
| .csv | the line that a row begins at; its cells may hold lines | the places of the rows |
| .json | position in the array | all rows: save large sets as .jsonl |
| .parquet .arrow | position | nothing: `datasets` maps an Arrow file |
"""

import csv
import io
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from srppo.data.store import Spans
from srppo.errors import DataError

Row = dict[str, Any]


@dataclass(frozen=True)
class Unreadable:
    """A row that could not be read: its number (counted from 1) and why."""

    number: int
    reason: str


@dataclass(frozen=True)
class Rows:
    """The rows of a file, and those that could not be read."""

    rows: Sequence[Row]
    numbers: Sequence[int]
    """Number of each row in its file, from 1: the line of a text file."""
    unreadable: list[Unreadable] = field(default_factory=list)

    @classmethod
    def of(cls, items: Iterable[Any], rows: Any) -> "Rows":
        """Numbers `items` from 1 and appends those that are objects to `rows`."""
        numbers = array("Q")
        unreadable: list[Unreadable] = []
        for number, item in enumerate(items, start=1):
            if isinstance(item, dict):
                rows.append(item)
                numbers.append(number)
            else:
                unreadable.append(Unreadable(number, "not an object"))
        return cls(rows, numbers, unreadable)


def read_file(path: Path) -> Rows:
    """All rows of a file, by its suffix.

    Raises:
        DataError: no such file, an unknown suffix, or a file that is not what its suffix says.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: files that end in {path.suffix!r} cannot be read. "
            f"Save it as one of {', '.join(READERS)}."
        )
    try:
        return reader(path)
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: there is no such file. Give a path that exists, seen from "
            f"{Path.cwd()}, or the name of a data set on the Hugging Face hub."
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}). Check the path.") from error


def _read_jsonl(path: Path) -> Rows:
    """One row per line; blank lines are no rows."""
    spans = _spans(path, _parse_line)
    numbers = array("Q")
    unreadable: list[Unreadable] = []
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    _parse_line(line)
                    spans.add(start, len(line))
                    numbers.append(number)
                except _BadRowError as error:
                    if not numbers and not unreadable:
                        _require_whole(path, number, line)
                    unreadable.append(Unreadable(number, str(error)))
            start += len(line)
    return Rows(spans, numbers, unreadable)


def _spans(path: Path, decode: Callable[[bytes], Row]) -> Spans[Row]:
    """Rows of a file that is opened for each: a glob may match more than may be open."""

    def read(start: int, length: int) -> Row:
        try:
            with path.open("rb", buffering=0) as file:
                return decode(os.pread(file.fileno(), length, start))
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path} was changed while it was read ({error}), so its rows are not where they "
                "were. Run again, and let the file be meanwhile."
            ) from error

    return Spans(read)


class _BadRowError(ValueError):
    """A row that cannot be read; the message is the reason."""


def _parse_line(line: bytes) -> Row:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _BadRowError("not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise _BadRowError("not JSON") from error
    if not isinstance(row, dict):
        raise _BadRowError("not an object")
    return row


def _require_whole(path: Path, number: int, first: bytes) -> None:
    """Raise DataError where the first line is JSON that goes on behind its end: of a value over
    several lines a few, such as the last row of an array, could be taken for rows."""
    text = first.decode("utf-8-sig", "replace").strip()
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        if error.pos >= len(text.rstrip(" ,")):
            raise DataError(
                f"{path}: line {number} is not a whole object, so the file is not one object per "
                "line, and only those lines that happen to be one would be used. If it is an "
                "array of objects, [...], name it .json; else write each row on a line of its own."
            ) from error
    except RecursionError:
        pass


def _read_json(path: Path) -> Rows:
    """An array of objects; a file that does not start with `[` is read as JSONL."""
    with path.open("rb") as file:
        head = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head.startswith(b"["):
        return _read_jsonl(path)
    try:
        return Rows.of(json.loads(path.read_bytes().decode("utf-8-sig")), [])
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not a JSON array ({error}), so none of its rows can be used. Repair the "
            "file, or save one object per line as .jsonl, where single bad lines do no harm."
        ) from error


def _read_csv(path: Path) -> Rows:
    """A table with a header line; a cell may hold line breaks. Cells stay text."""
    csv.field_size_limit(2**31 - 1)  # the default refuses cells of more than 131,072 characters
    header: list[str] = []

    def decode(span: bytes) -> Row:
        (cells,) = csv.reader(io.StringIO(span.decode("utf-8"), newline=""), strict=True)
        return dict(zip(header, cells + [None] * (len(header) - len(cells)), strict=True))

    spans = _spans(path, decode)
    numbers = array("Q")
    unreadable: list[Unreadable] = []
    with path.open("rb") as file:
        lines = _Lines(file)
        table = csv.reader(lines, strict=True)  # else an open quote swallows the rows behind it
        start, first = 0, 1
        try:
            for cells in table:
                if not header:
                    header += cells
                    _require_text(path, header)
                elif not all(map(_is_text, cells)):
                    unreadable.append(Unreadable(first, "not UTF-8"))
                elif len(cells) > len(header):
                    unreadable.append(Unreadable(first, "more cells than columns"))
                elif cells:
                    spans.add(start, lines.read - start)
                    numbers.append(first)
                start, first = lines.read, table.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{path}: not a table from line {first} on ({error}), so the rows after it cannot "
                "be told apart. Mend that line: a quote that opens a cell must close it, and is "
                'doubled within it (""). Or save it as .jsonl.'
            ) from error
    return Rows(spans, numbers, unreadable)


class _Lines(Iterator[str]):
    """Lines of a file, with the bytes read so far; what is not UTF-8 becomes lone surrogates.
    Without the mark that the file may begin with: a quote behind it would open no cell."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.read = file, 0

    def __next__(self) -> str:
        line = next(self._file)
        encoding = "utf-8" if self.read else "utf-8-sig"
        self.read += len(line)
        return line.decode(encoding, "surrogateescape")


def _require_text(path: Path, header: list[str]) -> None:
    if not all(map(_is_text, header)):
        raise DataError(
            f"{path}: not a UTF-8 table with a header line, so its columns have no names. "
            "Save it as UTF-8 CSV, or as .jsonl."
        )


def _is_text(cell: str) -> bool:
    """False where bytes were not UTF-8: they came as lone surrogates."""
    return cell.isascii() or not any("\udc80" <= char <= "\udcff" for char in cell)


def _read_table(path: Path) -> Rows:
    """Parquet, or Arrow as `datasets` or pyarrow write it."""
    import datasets  # late: seconds to import, and text files do without

    kind = path.suffix.lower().removeprefix(".")
    with path.open("rb"):
        pass  # a missing file is told apart from a broken one
    try:
        rows = datasets.load_dataset(kind, data_files=str(path.resolve()), split="train")
    except Exception as error:  # the cache, the disk and each file format raise their own
        raise DataError(
            f"{path}: not a {kind.capitalize()} file ({error.__cause__ or error}). Write it anew."
        ) from error
    return Rows(rows, range(1, len(rows) + 1))


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_table,
    ".arrow": _read_table,
}
