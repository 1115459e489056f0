"""A report of `reporting` as text: for the terminal, the run directory and the page."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from srppo.data.load import Data

BAR = 40
"""Columns of the longest bar."""
NAMED = 8
"""Rows named in the text for each reason."""
OPEN, CLOSE = "⟦", "⟧"
"""Around the tokens that are trained on."""


def describe(report: Mapping[str, Any], unit: str = "tokens") -> str:
    """Counts, reasons, lengths and first examples of one set, as data.json has them."""
    lines = [
        f"{report['source']}: {report['used']} of {report['rows']} rows used"
        + _also(report, "examples", "demonstrations", report["used"])
        + _also(report, "skipped", "passed over")
        + _also(report, "not_needed", "not needed"),
        f"  columns: {', '.join(f'{k} ({n})' for k, n in report['schemas'].items()) or 'none'}",
        f"  chat template: {report['template']}",
    ]
    for reason, count in sorted(report["dropped"].items(), key=lambda item: -item[1]):
        lines.append(f"  dropped {count}: {reason}, rows {_named(report, reason, count)}")
    for reason, count in report["turns_dropped"].items():
        lines.append(f"  turns without loss {count}: {reason}")
    if report["truncated"]:
        lines.append(f"  responses cut: {report['truncated']}; they have no EOS")
    for name in ("prompt", "response"):
        lines += _histogram(name, report[f"{name}_tokens"], unit)
    between = "│" if unit == "tokens" else ""
    if report["first"]:
        trained = f"; {OPEN}trained on{CLOSE}" if report["response_tokens"] else ""
        lines.append("  first examples as the model sees them" + trained)
    for example in report["first"]:
        lines += ["", f"row {example['row']}", between.join(example["prompt"])]
        if example["response"]:
            lines[-1] += OPEN + between.join(example["response"]) + CLOSE
    return "\n".join(lines) + "\n"


def describe_all(reports: Mapping[str, Any]) -> str:
    """data.json as text."""
    texts = {
        role: describe_overlap(report) if role == "overlap" else describe(report)
        for role, report in reports.items()
    }
    return "\n".join(f"== {role}\n{text}" for role, text in texts.items())


def describe_used(data: "Data", asked: int, note: str) -> str:
    """What a run says of its data when it starts; `asked` is data.held_out, "" is no note."""
    lines = []
    fewer = (
        f" (data.held_out={asked}: where all others are trained on, a tenth at most)"
        if 0 < len(data.held_out) < asked
        else ""
    )
    for role in ("demonstrations", "prompts", "eval"):
        if (report := data.reports.get(role)) is None:
            continue
        dropped = ", ".join(f"{n} {reason}" for reason, n in report["dropped"].items())
        lines.append(
            f"{role}: {report['used']} of {report['rows']} rows of {report['source']}"
            + (f"; dropped: {dropped}" if dropped else "")
            + (f"; {report['truncated']} truncated" if report["truncated"] else "")
        )
    lines.append(
        f"stage 1 trains on {len(data.train)} demonstrations, {len(data.held_out)} are held "
        f"out{fewer}; stage 2 has {len(data.prompts)} prompts"
    )
    lines.append(describe_overlap(data.reports["overlap"]).strip())
    return "\n".join([*lines, f"note: {note}"] if note else lines)


def describe_overlap(overlap: Mapping[str, Any]) -> str:
    """Which prompts of stage 2 and of the evaluation, if there is one, were seen before."""
    seen = overlap["contamination"]
    lines = [
        f"prompts of stage 2 ({overlap['setting']}): of {overlap['of']}, {overlap['exact']} are "
        f"those of demonstrations exactly, {overlap['ngram']} by 8-grams"
    ]
    whats = {"demonstrations": "demonstrations", "prompts": "prompts of stage 2"}
    for name, what in whats.items() if seen["of"] else ():
        lines.append(
            f"evaluation: of {seen['of']} prompts, {seen[name]['exact']} are among the {what} "
            f"exactly, {seen[name]['ngram']} by 8-grams"
        )
    return "\n".join(lines) + "\n"


def _also(report: Mapping[str, Any], key: str, words: str, unless: int = 0) -> str:
    return f", {report[key]} {words}" if report[key] not in (0, unless) else ""


def _named(report: Mapping[str, Any], reason: str, count: int) -> str:
    places = report["dropped_rows"][reason][:NAMED]
    return ", ".join(map(str, places)) + (f" and {count - len(places)} more" * (count > NAMED))


def _histogram(name: str, lengths: Mapping[str, Any], unit: str) -> list[str]:
    if not lengths:
        return []
    lines = [
        f"  {name}s, {unit}: {lengths['min']} to {lengths['max']}, median "
        f"{lengths['median']:g}, mean {lengths['mean']:.1f}"
    ]
    most = max(count for _, _, count in lengths["bars"])
    width = len(f"{lengths['max']}")
    for low, high, count in lengths["bars"]:
        bar = "█" * round(BAR * count / most) or "▏" * bool(count)
        lines.append(f"    {low:>{width}} to {high:>{width}} {bar} {count}")
    return lines
