"""Reads a result directory of `srppo eval`: results.json and samples/TASK.jsonl, checked."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from srppo.errors import RunDirError

SCHEMA = 1

Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Score = Finite | Annotated[list[Finite], Field(min_length=1)]
"""Of one question; a list where it has several, as IFEval's instructions."""


class _Part(BaseModel):
    """Of a file: what is not asked for is left alone."""

    model_config = ConfigDict(frozen=True)


class Metric(_Part):
    """A score, a fraction, with its standard error and 95% interval; None where not known."""

    value: Share
    stderr: Finite | None
    low: Finite | None
    high: Finite | None
    n: Count
    kind: Literal["proportion", "clustered", "mean", "reference"]


class Task(_Part):
    """What one model did on one benchmark; None where not known, as of stored responses."""

    version: str | int | float
    n: Count
    headline: str
    metrics: dict[str, Metric]
    template: str | None
    template_sha256: str | None
    data_sha256: str | None
    prompts_sha256: str | None
    mean_length: Finite | None
    eos_rate: Share | None
    truncated_responses: Count | None
    truncated_prompts: Count | None
    empty: Count | None
    settings: dict[str, Any] = {}
    notes: list[str] = []


class Model(_Part):
    """Which model it was, or the file with its responses."""

    path: str | None
    sha256: str | None = None
    responses: str | None = None


class Results(_Part):
    """results.json."""

    model: Model
    created: str
    seed: int | None
    config: dict[str, Any] = {}
    tasks: dict[str, Task]
    failed: dict[str, str] = {}


class Sample(_Part):
    """A question, without its text; None where a metric could not be scored."""

    doc_id: int | str
    prompt_sha256: str
    scores: dict[str, Score | None]


@dataclass(frozen=True)
class Stored:
    """A model's result directory, under the name that the model has in a comparison."""

    name: str
    directory: Path
    results: Results
    _samples: dict[str, list[Sample]] = field(default_factory=dict)

    @staticmethod
    def read(name: str, directory: Path) -> Stored:
        """results.json; raises RunDirError where it cannot be compared."""
        return Stored(name, directory, _read_results(directory))

    def task(self, name: str) -> Task:
        """What results.json says of it."""
        return self.results.tasks[name]

    def samples(self, task: str) -> list[Sample]:
        """The task's questions, read once; raises RunDirError where they cannot be paired."""
        if task not in self._samples:
            path = self.directory / "samples" / f"{task}.jsonl"
            self._samples[task] = _read_samples(path, self.task(task))
        return self._samples[task]


def _read_results(directory: Path) -> Results:
    path = directory / "results.json"
    if not path.is_file() and directory.is_dir():
        below = sorted(p.parent.name for p in directory.glob("*/results.json"))
        cure = f"{directory} holds {', '.join(below)}: give one of them." if below else _CURE
        raise RunDirError(f"{path} is missing: there are no scores to compare. {cure}")
    tree = _parsed(_text(path), str(path))
    found = tree.get("schema") if isinstance(tree, dict) else None
    if found != SCHEMA:
        newer = isinstance(found, int) and found > SCHEMA
        kind = " It is of `srppo run`." if isinstance(tree, dict) and "rows" in tree else ""
        raise RunDirError(
            f"{path} has schema {found}, not {SCHEMA}: its scores cannot be compared.{kind} "
            f"{'Update srppo.' if newer else 'Evaluate the model with `srppo eval`.'}"
        )
    results = _checked(Results, tree, str(path))
    for name, task in results.tasks.items():
        if task.headline not in task.metrics:
            raise RunDirError(
                f"{path}: the headline of {name}, {task.headline!r}, is none of its metrics "
                f"({', '.join(task.metrics)}): it cannot be compared. {_CURE}"
            )
    return results


def _read_samples(path: Path, task: Task) -> list[Sample]:
    lines = _text(path).split("\n")  # not splitlines: JSON may hold U+2028
    samples = [
        _checked(Sample, _parsed(line, where), where)
        for i, line in enumerate(lines, 1)
        if line and (where := f"{path}, line {i}")
    ]
    distinct = len({sample.doc_id for sample in samples})
    if not task.n == len(samples) == distinct:
        raise RunDirError(
            f"{path} holds {len(samples)} questions, {distinct} different ones, results.json "
            f"speaks of {task.n}: they cannot be paired. {_CURE}"
        )
    for name, metric in task.metrics.items():
        if metric.kind != "reference":  # of all questions together
            _require_consistent(path, name, metric, samples)
    return samples


def _require_consistent(path: Path, name: str, metric: Metric, samples: list[Sample]) -> None:
    """The questions' scores are of the metric's kind and have its value as their mean."""
    flat = []
    for sample in samples:
        score = sample.scores.get(name)
        if score is None:
            continue
        several = score if isinstance(score, list) else [score]
        binary = all(x in (0, 1) for x in several)
        is_list, wants_list = isinstance(score, list), metric.kind == "clustered"
        if is_list != wants_list or (metric.kind == "proportion" and not binary):
            raise RunDirError(
                f"{path}, doc_id {sample.doc_id}: {name}={score!r:.60} is not what a "
                f"{metric.kind} is made of: it cannot be compared. {_CURE}"
            )
        flat += several
    value = math.fsum(flat) / len(flat) if flat else math.nan
    if not abs(value - metric.value) < 1e-4:  # less than one question in 10,000
        raise RunDirError(
            f"{path}: the mean of {name} is {value:.4f}, results.json says {metric.value:.4f}: "
            f"the two are not of one evaluation. {_CURE}"
        )


_Checked = TypeVar("_Checked", bound=_Part)


def _checked(kind: type[_Checked], tree: Any, where: str) -> _Checked:
    try:
        return kind.model_validate(tree)
    except ValidationError as e:
        error = e.errors()[0]
        key = ".".join(map(str, error["loc"])) or "all of it"
        value = "" if error["type"] == "missing" else f"={error['input']!r:.60}"
        said = error["msg"][:1].lower() + error["msg"][1:]
        raise RunDirError(f"{where}: {key}{value}: {said}. It cannot be compared. {_CURE}") from e


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as e:
        raise RunDirError(f"{where} is not valid JSON ({e}): it cannot be compared. {_CURE}") from e


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise RunDirError(f"{path} cannot be read ({e}): it cannot be compared. {_CURE}") from e


_CURE = "Restore it from a copy, or run `srppo eval` again into a new directory."
