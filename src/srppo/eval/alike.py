"""What keeps two models' scores from being compared, and what a reader should know beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from srppo.errors import ConfigError
from srppo.eval.read import Stored, Task

CURES = {
    "version": "evaluate both with the same lm-eval or alpaca-eval",
    "headline": "score both with the same judge and references",
    "n": "use the same --limit, or have the rest judged with --resume",
    "template": "use the same --chat-template",
    "template_sha256": "use the same --chat-template",
}
"""What has to be the same in results.json, and how to make it so."""

JUDGED = {
    "judge": "have both judged by the same",
    "baseline": "score both against the same outputs",
    "sha256 of the baseline's outputs": "score both with the same --data-dir",
    "form": "have both judged in the same form",
    "form's template": "judge both with the same alpaca-eval",
}
"""The same, of how AlpacaEval's pairs were judged, where both say it: annotations of others say
their judge and baseline alone."""

FOUND = {"wins", "losses", "draws", "discrete_win_rate", "mean_characters", "responses"}
"""Beside the settings in results.json, but of the model itself."""


def require_alike(first: Stored, others: list[Stored], tasks: list[str]) -> None:
    """Raises ConfigError with everything that keeps `others` from being paired with `first`."""
    reasons = [
        f"  {task}, {other.name} and {first.name}: {reason}"
        for task in tasks
        for other in others
        for reason in unlike(first, other, task)
    ]
    if reasons:
        lines = "\n".join(reasons)
        raise ConfigError(
            "The models were not asked the same, so that a difference would not be theirs alone:\n"
            f"{lines}\nRun `srppo eval` for both in the same way, choose other tasks with --tasks, "
            "or compare on the questions that both have with --force."
        )


def unlike(first: Stored, other: Stored, task: str) -> list[str]:
    """Why the two cannot be paired, each reason with its cure; `other`'s values first."""
    a, b = first.task(task), other.task(task)
    reasons = []
    for key, cure in CURES.items():
        ours, theirs = getattr(a, key), getattr(b, key)
        if ours != theirs and (key != "template_sha256" or a.template == b.template):
            if key.startswith("template"):
                cure += _templates([m for m, t in ((other, b), (first, a)) if t.template == "chat"])
            reasons.append(f"{key} is {_short(theirs)} and {_short(ours)}; {cure}.")
    ours, theirs = _judging(a), _judging(b)
    reasons += [
        f"{key} is {_short(theirs[key])} and {_short(ours[key])}; {cure}."
        for key, cure in JUDGED.items()
        if None not in (ours[key], theirs[key]) and ours[key] != theirs[key]
    ]
    asked, answered = ({s.doc_id: s.prompt_sha256 for s in m.samples(task)} for m in (first, other))
    found = []
    if differ := [i for i in asked if i in answered and asked[i] != answered[i]]:
        found.append(f"{len(differ)} prompts differ, the first at doc_id {differ[0]}")
    if a.n == b.n and (alone := asked.keys() ^ answered.keys()):
        found.append(f"{len(alone)} questions are in one of them only")
    if asked == answered and a.prompts_sha256 != b.prompts_sha256:
        found.append("prompts_sha256 differs though no prompt does")
    if found:
        reasons.append(f"{', '.join(found)}; use the same data, template and examples.")
    return reasons


def _judging(task: Task) -> dict[str, Any]:
    """Under the keys of JUDGED; None where it is not known."""
    said = task.settings
    return {
        "judge": said.get("judge"),
        "baseline": said.get("baseline"),
        "sha256 of the baseline's outputs": task.data_sha256 if "judge" in said else None,
        "form": said.get("form"),
        "form's template": said.get("template_sha256"),
    }


def settings_that_differ(first: Stored, other: Stored, task: str) -> list[str]:
    """Of generation, seed and data: no reason to refuse, but to be said."""
    ours, theirs = (
        {
            **model.task(task).settings,
            "seed": model.results.seed,
            "data_sha256": model.task(task).data_sha256,
        }
        for model in (first, other)
    )
    return [
        f"{task}: {key} is {_short(theirs.get(key))} ({other.name}), "
        f"{_short(ours.get(key))} ({first.name})."
        for key in {**ours, **theirs}
        if ours.get(key) != theirs.get(key) and key not in FOUND
    ]


def _templates(asked: list[Stored]) -> str:
    """What to pass, for models that were asked through a template."""
    if not asked:
        return ""
    files = []
    for model in asked:
        given = model.results.config.get("chat_template", "auto")
        where = model.results.model.path or ""
        places = [Path(where, "chat_template.jinja"), Path(where, "policy", "chat_template.jinja")]
        places = places if given in ("auto", "none") else [Path(given)]
        file = next((place for place in places if place.is_file()), None)
        files.append(
            f"{file}, which is {model.name}'s"
            if file
            else f"a file with {model.name}'s, of the tokenizer of {where}"
        )
    return f" for both, {', or '.join(files)}; and another --out"


def _short(value: Any) -> str:
    text = "unknown" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
