"""What ran, on what, with which data."""

import json
from dataclasses import dataclass

from srppo.report.curves import series
from srppo.report.numbers import duration, plain
from srppo.report.read import Json, RunFiles, mapping, number, sequence


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """run.json and data.json made ready for the page."""

    run_known: bool
    """False without run.json."""
    facts: list[tuple[str, str]]
    changes: list[tuple[str, list[str]]]
    stages: list[tuple[str, str, str]]
    """(stage, status, time)."""
    recipe: list[tuple[str, str]]
    """(dotted key, value as it would be typed)."""
    versions: list[tuple[str, str]]
    data: list[tuple[str, str, str, str, str]]
    """(set, source, rows, used, what was dropped)."""
    data_notes: list[str]
    data_text: str


def view(files: RunFiles) -> Provenance | None:
    """What the run says about itself; None if it left neither run.json nor data.json."""
    if files.run is None and files.data is None:
        return None
    run = files.run or {}
    stages = [
        (name, str(stage.get("status", "–")), duration(number(stage.get("seconds"))))
        for name, stage in mapping(run, "stages").items()
        if isinstance(stage, dict)
    ]
    return Provenance(
        run_known=files.run is not None,
        facts=_facts(run, files),
        changes=changes(run),
        stages=stages,
        recipe=flat(mapping(run, "recipe")),
        versions=[(name, str(version)) for name, version in mapping(run, "versions").items()],
        data=_data(files.data),
        data_notes=_data_notes(files.data),
        data_text=files.data_text,
    )


def changes(run: Json | None) -> list[tuple[str, list[str]]]:
    """With what the run went on that it had not begun with, `--allow-change`: (when, what)."""
    return [
        (str(change.get("at")), [str(line) for line in sequence(change, "changed")])
        for change in sequence(run, "changes")
        if isinstance(change, dict)
    ]


def flat(tree: Json, prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as (key.sub, value) pairs, values in JSON: the form of an override."""
    pairs = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            pairs += flat(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            pairs.append((f"{prefix}{key}", text))
    return pairs


def _facts(run: Json, files: RunFiles) -> list[tuple[str, str]]:
    hardware, models = mapping(run, "hardware"), mapping(run, "models")
    memory, cores = number(hardware.get("memory_gib")), number(hardware.get("cores"))
    threads = number(hardware.get("threads"))
    parts = [
        hardware.get("gpu"),
        hardware.get("processor"),
        cores and f"{plain(cores)} cores",
        threads and f"{plain(threads)} thread{'s' if threads > 1 else ''} used",
        memory and f"{plain(memory)} GiB memory",
        hardware.get("platform"),
    ]
    finished = run.get("finished") or (run and "not finished: still running, or interrupted")
    facts = [
        ("Command", run.get("command")),
        ("Recipe", run.get("recipe_source")),
        ("Base model", models.get("base")),
        ("SFT model", models.get("sft")),
        ("Seed", run.get("seed")),
        ("srppo", run.get("srppo_version")),
        ("Commit", run.get("commit")),
        ("Hardware", ", ".join(str(part) for part in parts if part)),
        ("Started", run.get("started")),
        ("Finished", finished),
        ("PPO time", _ppo_time(files)),
        *((f"Stopped: {name}", reason) for name, reason in mapping(run, "stopped").items()),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "", {})]


def _ppo_time(files: RunFiles) -> str:
    """How the time of the PPO steps divides, and medians of speed, use of the machine, padding."""
    phases = ("rollout", "scoring", "update", "other")
    totals = {part: sum(series(files.ppo, f"time/{part}")[1]) for part in phases}
    whole = sum(totals.values())
    words = [f"{part} {100 * t / whole:.0f} %" for part, t in totals.items() if whole and t]
    if speed := _median(files, "time/tokens_per_second"):
        words.append(f"{plain(speed)} tokens per second")
    if share := _median(files, "time/attainable_share"):
        words.append(f"{100 * share:.0f} % of the attainable rate")
    if (padding := _median(files, "padding")) is not None:
        words.append(f"padding {100 * padding:.1f} %")
    return ", ".join(words)


def _median(files: RunFiles, key: str) -> float | None:
    values = sorted(series(files.ppo, key)[1])
    return values[len(values) // 2] if values else None


def _data(data: Json | None) -> list[tuple[str, str, str, str, str]]:
    rows = []
    for name, entry in (data or {}).items():
        if not isinstance(entry, dict) or "source" not in entry:
            continue
        dropped = [
            f"{plain(number(count))} {reason}"
            for reason, count in mapping(entry, "dropped").items()
            if number(count)
        ]
        truncated = number(entry.get("truncated"))
        if truncated:
            dropped.append(f"{plain(truncated)} truncated")
        counts = plain(number(entry.get("rows"))), plain(number(entry.get("used")))
        rows.append((name, str(entry["source"]), *counts, ", ".join(dropped) or "none"))
    return rows


def _data_notes(data: Json | None) -> list[str]:
    overlap = mapping(data, "overlap")
    exact, of = number(overlap.get("exact")), number(overlap.get("of"))
    if exact is None or of is None:
        return []
    notes = [
        f"{plain(exact)} of the {plain(of)} PPO prompts are also prompts of the demonstrations."
    ]
    if evaluated := number(overlap.get("evaluated")):
        notes.append(f"{plain(evaluated)} of them are evaluation prompts, too: PPO has seen those.")
    if ngram := number(overlap.get("ngram")):
        notes.append(f"{plain(ngram)} share half of their 8-grams with those of demonstrations.")
    return notes
