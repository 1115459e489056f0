"""Reads a run directory: files in, plain dictionaries out. An absent file is an absent part."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srppo.errors import RunDirError

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """What a run directory holds; None or an empty list where a file is missing."""

    name: str
    run: Json | None
    data: Json | None
    audit: Json | None
    results: Json | None
    sft: list[Json]
    """One entry per step, in order; lines of the same step are merged, the later one wins."""
    ppo: list[Json]
    samples: list[Json]
    data_text: str = ""
    """What `srppo data check` says of the data."""
    notes: list[str]
    """What was read around, for the page to say."""


def read(run_dir: Path) -> RunFiles:
    """Everything in `run_dir` that the report knows.

    Raises:
        RunDirError: not a directory, none of the known files in it, or one of them is corrupt.
    """
    if not run_dir.is_dir():
        raise RunDirError(
            f"{run_dir} is not a directory: there is no run to report on. "
            "Give the directory that `srppo run` wrote."
        )
    notes: list[str] = []
    files = RunFiles(
        name=run_dir.resolve().name,
        run=_object(run_dir / "run.json"),
        data=_object(run_dir / "data.json"),
        audit=_object(run_dir / "audit.json"),
        results=_object(run_dir / "results.json"),
        sft=_by_step(_lines(run_dir / "metrics" / "sft.jsonl", notes)),
        ppo=_by_step(_lines(run_dir / "metrics" / "ppo.jsonl", notes)),
        samples=_lines(run_dir / "samples.jsonl", notes),
        data_text=_text(run_dir / "data.txt") or "",
        notes=notes,
    )
    parts = (files.run, files.data, files.audit, files.results)
    if all(part is None for part in parts) and not (files.sft or files.ppo or files.samples):
        raise RunDirError(
            f"{run_dir} holds no run.json, metrics, audit.json or results.json: there is nothing "
            "to report. Give the directory that `srppo run` wrote."
        )
    return files


def number(value: object) -> float | None:
    """`value` as a finite float, or None if it is anything else (NaN, null, text, true)."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300:
        return float(value)
    return None


def mapping(parent: object, key: str) -> Json:
    """`parent[key]` if that is an object, else an empty one."""
    value = parent.get(key) if isinstance(parent, dict) else None
    return value if isinstance(value, dict) else {}


def sequence(parent: object, key: str) -> list[Any]:
    """`parent[key]` if that is a list, else an empty one."""
    value = parent.get(key) if isinstance(parent, dict) else None
    return value if isinstance(value, list) else []


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise RunDirError(f"{path} cannot be read ({error}): {_CURE}") from error


def _object(path: Path) -> Json | None:
    text = _text(path)
    return None if text is None else _parse(text, str(path))


def _lines(path: Path, notes: list[str]) -> list[Json]:
    """Each line an object. A last line without its newline was cut off by a kill: left out."""
    lines = (_text(path) or "").split("\n")
    unfinished = lines.pop()
    rows = [_parse(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    if unfinished.strip():
        try:
            rows.append(_parse(unfinished, str(path)))
        except RunDirError:
            notes.append(f"The last line of {path.name} is incomplete and is left out.")
    return rows


def _parse(text: str, where: str) -> Json:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise RunDirError(f"{where} is not valid JSON ({error}): {_CURE}") from error
    if not isinstance(value, dict):
        raise RunDirError(f"{where} holds a {type(value).__name__}, not a JSON object: {_CURE}")
    return value


def _by_step(rows: list[Json]) -> list[Json]:
    """Rows merged by step: a resumed run repeats steps, an evaluated step may take two lines."""
    merged: dict[float, Json] = {}
    for row in rows:
        step = number(row.get("step"))
        if step is not None:
            merged.setdefault(step, {}).update(row)
    return [merged[step] for step in sorted(merged)]


_CURE = (
    "the report cannot be built. Restore the file from a copy or run its stage again, "
    "or delete it to have the report without that part."
)
