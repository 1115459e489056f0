"""Answers of a model on disk, chunk by chunk: what is finished survives any interruption.

Line 1 holds what the answers depend on, each further line one answer. A chunk's lines are written
at once and reach the disk before the next chunk begins; a chunk that is not whole is asked again,
whole. So what a model is asked together, and with it every answer, is the same however often it
was interrupted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from srppo.errors import RunDirError

Row = dict[str, Any]


class Finished:
    """Answers by the number of their request."""

    def __init__(self, path: Path | None, origin: Row, chunks: Sequence[Sequence[int]]) -> None:
        """Goes on with what `path` holds of these chunks; None: nothing is kept.

        Raises:
            RunDirError: it holds answers of another model, or to other requests.
        """
        self.path = path
        self.rows: dict[int, Row] = {}
        if path is None:
            return
        lines = _whole_lines(path)
        if lines:
            self._require_same(json.loads(lines[0]), origin)
        rows = {row["request"]: row for row in map(json.loads, lines[1:])}
        for chunk in chunks:
            if rows.keys() >= set(chunk):
                self.rows |= {i: rows[i] for i in chunk}
        write(path, lines_of([origin, *self.rows.values()]))

    def add(self, rows: Sequence[Row]) -> None:
        """A chunk's answers, each with the number of its `request`."""
        self.rows |= {row["request"]: row for row in rows}
        if self.path is None:
            return
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(lines_of(rows))
            file.flush()
            os.fsync(file.fileno())

    def _require_same(self, found: Row, origin: Row) -> None:
        wanted = json.loads(json.dumps(origin))
        changed = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
        if changed:
            key = changed[0]
            raise RunDirError(
                f"{self.path} holds answers that were made with {key}={found.get(key)!r:.60}, "
                f"now it is {wanted.get(key)!r:.60}: going on would mix the two. Give another "
                "--out, or what it began with."
            )


def _whole_lines(path: Path) -> list[str]:
    """Without the last one where it was cut off."""
    if not path.exists():
        return []
    with writing(path):
        return path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]


def lines_of(rows: Sequence[Row]) -> str:
    """JSON, a line each."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path: Path, text: str) -> None:
    """A file, whole or not at all."""
    aside = path.with_name(path.name + ".part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into an error that names path and cure."""
    try:
        yield
    except OSError as e:
        raise RunDirError(
            f"cannot write {path} ({e.strerror or e}): what was finished before is whole. Free "
            "space or mend the permissions, then run the same command with --resume; or give "
            "another --out."
        ) from e
