"""Where rows come from: a local file, the Hugging Face hub, or a Python generator.

    data.jsonl  data.json  data.csv  data.parquet   a local file (a file is one split)
    name  owner/name  owner/name:config  ./folder   `datasets.load_dataset`
    python:package.module:function                  function(seed=..., split=...) yields rows

Local JSONL is read tolerantly: a line that cannot be read is kept as an `Unreadable`, to be
counted with its line number, and the other lines are used.
"""

import csv
import importlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from srppo.errors import DataError, SrppoError

Row = dict[str, Any]


@dataclass(frozen=True)
class Unreadable:
    """A row that could not be read: its number (counted from 1) and why."""

    number: int
    reason: str


@dataclass(frozen=True)
class Rows:
    """The rows of a source, and those that could not be read."""

    rows: Sequence[Row]
    numbers: Sequence[int]
    """Number of each row in its source, from 1: the line of a JSONL file."""
    unreadable: list[Unreadable] = field(default_factory=list)

    def shuffled(self, seed: int) -> Iterator[tuple[int, Row]]:
        """(number, row) of all readable rows in an order that depends on `seed` and their count."""
        order = list(range(len(self.rows)))
        random.Random(seed).shuffle(order)
        for index in order:
            yield self.numbers[index], self.rows[index]


def read_rows(source: str, seed: int, split: str) -> Rows:
    """All rows of `source`; `seed` reaches generators only, `split` is without effect on files.

    Raises:
        DataError: the source does not exist, cannot be reached, or is of an unknown kind.
    """
    if source.startswith("python:"):
        return _sort_out(enumerate(_generate(source, seed, split), start=1))
    path = Path(source).expanduser()
    reader = _READERS.get(path.suffix.lower())
    if reader is None and path.is_file():
        raise DataError(
            f"{source}: files that end in {path.suffix!r} cannot be read. "
            f"Save it as one of {', '.join(_READERS)}."
        )
    if reader is None:
        return _load_hub(source, split)
    try:
        return _sort_out(reader(path))
    except FileNotFoundError as error:
        raise DataError(
            f"{source}: there is no such file. Give a path that exists, seen from "
            f"{Path.cwd()}, or the name of a data set on the Hugging Face hub."
        ) from error
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error}). Check the path.") from error


def _sort_out(numbered: Iterable[tuple[int, Any]]) -> Rows:
    """Part the rows that are objects from everything else."""
    rows: list[Row] = []
    numbers: list[int] = []
    unreadable: list[Unreadable] = []
    for number, row in numbered:
        if isinstance(row, dict):
            rows.append(row)
            numbers.append(number)
        else:
            reason = row.reason if isinstance(row, Unreadable) else "not an object"
            unreadable.append(Unreadable(number, reason))
    return Rows(rows, numbers, unreadable)


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """One row per line; blank lines are no rows; an unreadable line comes as `Unreadable`."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _parse_line(number, line)


def _parse_line(number: int, line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Unreadable(number, "not UTF-8")
    except (ValueError, RecursionError):
        return Unreadable(number, "not JSON")


def _read_json(path: Path) -> Iterable[tuple[int, Any]]:
    """An array of objects; a file that does not start with `[` is read as JSONL."""
    content = path.read_bytes()
    if not content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        return _read_jsonl(path)
    try:
        return enumerate(json.loads(content.decode("utf-8-sig")), start=1)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not a JSON array ({error}), so none of its rows can be used. Repair the "
            "file, or save one object per line as .jsonl, where single bad lines do no harm."
        ) from error


def _read_csv(path: Path) -> Iterator[tuple[int, Any]]:
    """A table with a header line; numbers count rows, not lines, since a cell may hold lines."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.DictReader(file), start=1):
                ragged = None in row  # where DictReader puts cells that have no header
                yield number, Unreadable(number, "more cells than columns") if ragged else row
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: not a UTF-8 table with a header line ({error}), so its rows cannot be told "
            "apart. Save it as UTF-8 CSV, or as .jsonl."
        ) from error


def _read_parquet(path: Path) -> Iterable[tuple[int, Any]]:
    import pyarrow  # late: heavy, and few sources need it
    import pyarrow.parquet

    try:
        return enumerate(pyarrow.parquet.read_table(path).to_pylist(), start=1)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a Parquet file ({error}). Write it anew.") from error


_READERS: dict[str, Callable[[Path], Iterable[tuple[int, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _load_hub(source: str, split: str) -> Rows:
    import datasets  # late: seconds to import, and local files do without

    name, _, config = source.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # the hub client, the network and each file format raise their own
        raise DataError(
            f"{source}: split {split!r} cannot be loaded ({type(error).__name__}: {error}). "
            "Check the name (owner/name, or owner/name:config where there are several), the split "
            f"and the network, or give a local file that ends in {', '.join(_READERS)}."
        ) from error
    return Rows(rows, range(1, len(rows) + 1))


def _generate(source: str, seed: int, split: str) -> Iterable[Any]:
    module_name, _, function_name = source.removeprefix("python:").partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(
            f"{source}: cannot be imported ({error}). Write python:package.module:function and "
            "put the folder of the package on PYTHONPATH."
        ) from error
    try:
        return list(function(seed=seed, split=split))
    except SrppoError:
        raise
    except Exception as error:  # the user's code can raise anything
        raise DataError(
            f"{source}: failed ({type(error).__name__}: {error}). It is called as "
            "function(seed=int, split=str) and yields rows, each a dictionary."
        ) from error
