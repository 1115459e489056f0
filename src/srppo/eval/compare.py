"""Models against one of them, question by question, from result directories of `srppo eval`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from srppo.errors import ConfigError
from srppo.eval import statistics
from srppo.eval.alike import require_alike, settings_that_differ, unlike
from srppo.eval.read import Metric, Score, Stored
from srppo.eval.statistics import Difference, Estimate

PAIRED: dict[str, tuple[str, Callable[[Any, Any], Difference]]] = {
    "proportion": ("McNemar, exact", statistics.paired_proportions),
    "mean": ("paired t", statistics.paired_means),
    "clustered": ("bootstrap by question", statistics.paired_clusters),
}
"""By the kind of a metric: where p is from."""

UNPAIRED = "normal, unpaired"
"""Of a reference's own estimate (length-controlled win rate): one fit over all questions."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model's score on a metric, and how it differs from the model compared with.

    Scores and differences are fractions, lengths tokens; None where not known, and from `against`
    on in the rows of the model compared with.
    """

    task: str
    version: str
    template: str | None
    metric: str
    headline: bool
    kind: str
    model: str
    n: int
    value: float
    stderr: float | None
    low: float | None
    high: float | None
    mean_length: float | None
    eos_rate: float | None
    truncated_responses: int | None
    truncated_prompts: int | None
    empty: int | None

    against: str | None = None
    questions: int | None = None
    """That the difference is paired by; None if it is not."""
    difference: float | None = None
    difference_stderr: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    gained: int | None = None
    lost: int | None = None
    p: float | None = None
    p_holm: float | None = None
    """Over the headlines of all tasks, for this pair of models."""
    test: str | None = None
    noise: float | None = None
    """A smaller difference cannot be told from chance."""


def compare(
    directories: dict[str, Path],
    against: str | None = None,
    tasks: Sequence[str] | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Every model against one, JSON-ready: models, rows (see `Row`) and notes.

    Args:
        directories: result directories by the name of the model here.
        against: the model compared with; None, the first.
        tasks: None, those that all models have.
        force: also models that were not asked the same, on the questions that both have.

    Raises:
        ConfigError: fewer than two models, unknown names, or models that were not asked the same.
        RunDirError: a directory whose files are missing, corrupt or of another schema.
    """
    if len(directories) < 2:
        raise ConfigError(
            f"There is nothing to compare {' '.join(directories) or 'no model'} with. Give two "
            "result directories or more, as base=DIR sft=DIR."
        )
    against = against or next(iter(directories))
    if against not in directories:
        raise ConfigError(
            f"--against {against} is none of the models ({', '.join(directories)}): there is "
            "nothing to compare with. Name one of them."
        )
    models = [Stored.read(name, path) for name, path in directories.items()]
    first = next(m for m in models if m.name == against)
    others = [m for m in models if m is not first]
    chosen, notes = _tasks(models, tasks)
    if not force:
        require_alike(first, others, chosen)
    rows: list[Row] = []
    for task in chosen:
        mine = [_row(first, m, task, x) for x in _metrics(models, task) for m in models]
        rows += mine
        notes += _noise(against, [r for r in mine if r.headline])
        notes += _notes(first, models, task, mine)
    return {
        "schema": 1,
        "against": against,
        "models": [
            {
                "name": m.name,
                "directory": str(m.directory),
                "created": m.results.created,
                **m.results.model.model_dump(include={"path", "sha256", "responses"}),
            }
            for m in models
        ],
        "rows": [asdict(row) for row in _adjusted(rows)],
        "notes": list(dict.fromkeys(notes)),
    }


def _tasks(models: list[Stored], asked: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Those to compare, and notes on those that cannot be."""
    every = [task for m in models for task in (*m.results.tasks, *m.results.failed)]
    chosen, notes = [], []
    for task in dict.fromkeys(asked or every):
        lacking = next((m for m in models if task not in m.results.tasks), None)
        if lacking is None:
            chosen.append(task)
            continue
        failed = lacking.results.failed.get(task)
        why = (
            f"failed for {lacking.name} ({failed})" if failed else f"is missing for {lacking.name}"
        )
        if asked:
            raise ConfigError(
                f"{task} {why}: it cannot be compared. {lacking.directory} holds "
                f"{', '.join(lacking.results.tasks) or 'no task'}; evaluate it with `srppo eval` "
                "or leave it out of --tasks."
            )
        notes.append(f"{task} {why}: not compared.")
    if not chosen:
        raise ConfigError(
            f"{', '.join(m.name for m in models)} have no task in common: nothing can be compared. "
            f"{' '.join(notes)} Evaluate all of them on the same tasks."
        )
    return chosen, notes


def _metrics(models: list[Stored], task: str) -> list[str]:
    """Those that all models have, the headline first."""
    own = [m.task(task).metrics for m in models]
    common = [x for x in own[0] if all(x in o and o[x].kind == own[0][x].kind for o in own)]
    if not common:
        raise ConfigError(
            f"{task}: {', '.join(m.name for m in models)} have no metric in common "
            f"({'; '.join(', '.join(o) for o in own)}): they cannot be compared. Score all of them "
            "in the same way, or choose other tasks with --tasks."
        )
    return sorted(common, key=lambda metric: metric != models[0].task(task).headline)


def _row(first: Stored, model: Stored, task: str, metric: str) -> Row:
    own = model.task(task)
    measured, reference = own.metrics[metric], first.task(task).metrics[metric]
    row = Row(
        task=task,
        version=str(own.version),
        template=own.template,
        metric=metric,
        headline=metric == own.headline,
        model=model.name,
        **measured.model_dump(),
        mean_length=own.mean_length,
        eos_rate=own.eos_rate,
        truncated_responses=own.truncated_responses,
        truncated_prompts=own.truncated_prompts,
        empty=own.empty,
    )
    if model is first:
        return row
    if measured.kind == "reference":
        test, d = UNPAIRED, statistics.unpaired(_estimate(reference), _estimate(measured))
    else:
        pairs = _pairs(first, model, task, metric)
        test, function = PAIRED[measured.kind]
        try:
            d = function([a for a, _ in pairs], [b for _, b in pairs])
        except ValueError as e:
            raise ConfigError(
                f"{task}, {metric}: {e}, so that {model.name} and {first.name} cannot be compared. "
                "Evaluate both with the same version."
            ) from e
    return replace(
        row,
        against=first.name,
        questions=d.n,
        difference=d.value,
        difference_stderr=_known(d.stderr),
        difference_low=_known(d.low),
        difference_high=_known(d.high),
        gained=d.gained,
        lost=d.lost,
        p=_known(d.p),
        test=test,
        noise=_known((d.high - d.low) / 2),
    )


def _pairs(first: Stored, second: Stored, task: str, metric: str) -> list[tuple[Score, Score]]:
    """Both scores of each question that both have: by doc_id in the same data, else by prompt."""
    data = first.task(task).data_sha256
    by_id = data is not None and data == second.task(task).data_sha256
    a, b = (
        {
            sample.doc_id if by_id else sample.prompt_sha256: score
            for sample in model.samples(task)
            if (score := sample.scores.get(metric)) is not None
        }
        for model in (first, second)
    )
    pairs = [(a[question], b[question]) for question in a if question in b]
    if not pairs:
        raise ConfigError(
            f"{task}: {second.name} and {first.name} have no question in common with a score of "
            f"{metric}: they cannot be compared. Evaluate both on the same data."
        )
    return pairs


def _adjusted(rows: list[Row]) -> list[Row]:
    """With Holm's p."""
    adjusted: dict[int, float] = {}
    for model in {row.model for row in rows}:
        mine = [(i, r.p) for i, r in enumerate(rows) if r.model == model and r.headline]
        known = {i: p for i, p in mine if p is not None}
        adjusted |= dict(zip(known, statistics.holm(list(known.values())), strict=True))
    return [replace(row, p_holm=adjusted.get(i)) for i, row in enumerate(rows)]


def _noise(against: str, rows: list[Row]) -> list[str]:
    """What a difference in the headline must exceed."""
    known = [(r, r.noise) for r in rows if r.noise is not None]
    if not known:
        return []
    bounds = ", ".join(f"{100 * noise:.1f} ({r.model})" for r, noise in known)
    within = [r.model for r, noise in known if abs(r.difference or 0) < noise]
    verdict = f" That is so for {', '.join(within)}." if within else ""
    return [
        f"{rows[0].task}, {known[0][0].questions or rows[0].n} questions: a difference from "
        f"{against} below so many points cannot be told from chance: {bounds}.{verdict}"
    ]


def _notes(first: Stored, models: list[Stored], task: str, rows: list[Row]) -> list[str]:
    """What else must be known beside the scores."""
    whole = {r.metric: r.n for r in rows if r.against is None}
    notes = [
        f"{task}, {r.metric}: {r.model} and {r.against} are compared on the {r.questions} "
        f"questions that both have, of {r.n} and {whole[r.metric]}."
        for r in rows
        if r.questions is not None and r.questions < max(r.n, whole[r.metric])
    ]
    for model in models:
        own = model.task(task)
        shown = {r.metric for r in rows}
        notes += [
            f"{task}: {x} is not there for all models." for x in own.metrics if x not in shown
        ]
        for note in own.notes:
            shared = all(note in m.task(task).notes for m in models)
            notes.append(f"{task}: {note}" if shared else f"{task}, {model.name}: {note}")
        if model is not first:
            notes += [
                f"{task}, {model.name} and {first.name}: {reason} Compared all the same."
                for reason in unlike(first, model, task)
            ]
            notes += settings_that_differ(first, model, task)
    return notes


def _estimate(metric: Metric) -> Estimate:
    errors = (metric.stderr, metric.low, metric.high)
    stderr, low, high = (math.nan if x is None else x for x in errors)
    return Estimate(metric.value, stderr, low, high, metric.n)


def _known(x: float) -> float | None:
    return x if math.isfinite(x) else None
