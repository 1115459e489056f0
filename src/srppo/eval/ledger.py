"""The verdicts of a judge on disk: each is kept as it comes, and none is asked for twice."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from srppo.errors import RunDirError
from srppo.eval.judge import Form, Judge, Verdict
from srppo.train.files import writing


@dataclass
class Ledger:
    """judgements.jsonl: a head that says who judges and how, then a line for each verdict."""

    form: Form
    head: dict[str, Any]
    known: dict[str, Verdict]
    """Verdicts from before, by the pair's key."""
    file: IO[str] | None = None

    @classmethod
    @contextmanager
    def open(cls, out_dir: Path | None, judge: Judge, seed: int, resume: bool) -> Iterator[Ledger]:
        """Begins a new one, or goes on with one by the same judge: it says how it was asked."""
        path = out_dir / "judgements.jsonl" if out_dir else None
        old = _lines(path) if path and resume else []
        form = Form.of(old[0]["form"]) if old else judge.form()
        head = {**judge.record, "form": form.name, "template_sha256": form.sha256, "seed": seed}
        if old and old[0] != head:
            differing = [key for key in head | old[0] if head.get(key) != old[0].get(key)]
            raise RunDirError(
                f"{path} holds verdicts with another {', '.join(differing)}: going on would mix "
                "the two. Leave --resume out to judge anew, or give another --out."
            )
        judged = [line for line in old[1:] if line["preference"] is not None]
        known = {line["pair"]: Verdict(*(line[k] for k in _VERDICT)) for line in judged}
        ledger = cls(form, head, known)
        if path is None:
            yield ledger
            return
        write_whole(path, "".join(json.dumps(line) + "\n" for line in [head, *judged]))
        with path.open("a", encoding="utf-8") as ledger.file:
            yield ledger

    def add(self, pair: str, verdict: Verdict) -> None:
        """Keeps a verdict, whatever happens next."""
        if self.file is None:
            return
        with writing(Path(self.file.name)):
            self.file.write(json.dumps({"pair": pair, **asdict(verdict)}) + "\n")
            self.file.flush()


_VERDICT = ("preference", "asked", "answer", "reason")


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines that are whole: a run that was killed can leave half a one at the end."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def write_whole(path: Path, text: str) -> None:
    """A whole file or none."""
    part = path.with_name(path.name + ".part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
