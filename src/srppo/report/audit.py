"""The audit of the reward before PPO, in pictures and in words."""

from dataclasses import dataclass, field
from itertools import pairwise

from markupsafe import Markup

from srppo.report import figures
from srppo.report.numbers import fixed, plain
from srppo.report.read import Json, mapping, number, sequence
from srppo.report.samples import visible

NAMES = {"demonstrations": "demonstrations", "sft": "sft samples", "base": "base samples"}
MOST_TOKENS = 20


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What the page shows of audit.json; empty where it lacks something."""

    prompts: str
    warnings: list[str]
    histograms: Markup | None
    rewards: list[tuple[str, str, list[str]]]
    """(series, name, [mean, sd, 5 %, 25 %, 50 %, 75 %, 95 %])."""
    separation: list[str] = field(default_factory=list)
    tokens: list[tuple[str, str, str, str]]
    """(token, how often, mean log-ratio, its % of the summed absolute log-ratio)."""
    curve: Markup | None
    reading: list[str]


def view(audit: Json | None) -> Audit | None:
    """audit.json made ready for the page; None if there is none."""
    if audit is None:
        return None
    return Audit(
        prompts=plain(number(audit.get("prompts"))),
        warnings=[str(text) for text in sequence(audit, "warnings")],
        histograms=_histograms(mapping(audit, "reward")),
        rewards=_rewards(mapping(audit, "reward")),
        separation=_separation(audit),
        tokens=_tokens(audit),
        curve=_curve(mapping(audit, "curve")),
        reading=_reading(mapping(audit, "curve")),
    )


def _histograms(reward: Json) -> Markup | None:
    rows = []
    for name in NAMES:
        histogram = mapping(mapping(reward, name), "histogram")
        edges = [number(x) for x in sequence(histogram, "edges")]
        counts = [number(x) for x in sequence(histogram, "counts")]
        numeric_edges = [x for x in edges if x is not None]
        numeric_counts = [x for x in counts if x is not None]
        rising = all(a < b for a, b in pairwise(numeric_edges))
        complete = len(numeric_edges) == len(edges) and len(numeric_counts) == len(counts)
        if complete and rising and counts and len(edges) == len(counts) + 1:
            mean = number(mapping(reward, name).get("mean"))
            rows.append((name, NAMES[name], numeric_edges, numeric_counts, mean))
    if not rows:
        return None
    means = ", ".join(f"{words} {plain(mean)}" for _, words, _, _, mean in rows)
    return figures.histograms("rewards", f"Histograms of the reward; mean of {means} nats", rows)


def _rewards(reward: Json) -> list[tuple[str, str, list[str]]]:
    rows = []
    for name, words in NAMES.items():
        entry = mapping(reward, name)
        quantiles = mapping(entry, "quantiles")
        values = [entry.get("mean"), entry.get("std")]
        values += [quantiles.get(q) for q in ("5", "25", "50", "75", "95")]
        if entry:
            rows.append((name, words, [fixed(number(value), 2) for value in values]))
    return rows


def _separation(audit: Json) -> list[str]:
    """Separation and correlation with length, each as a sentence."""
    sentences = []
    separation = mapping(audit, "separation")
    pairs = {
        "sft_vs_base_auc": "an sft sample",
        "demonstrations_vs_base_auc": "a demonstration",
    }
    for key, subject in pairs.items():
        auc = number(separation.get(key))
        if auc is not None:
            sentences.append(
                f"In {100 * auc:.0f} % of random pairs, {subject} has a higher reward than a "
                "base sample (50 % would be no separation)."
            )
    cut_off = number(mapping(audit, "cut_off").get("share"))
    if cut_off:
        sentences.append(f"{100 * cut_off:.0f} % of the sft samples were cut off.")
    for name, value in mapping(audit, "length_corr").items():
        correlation = number(value)
        if correlation is not None and not (name == "sft" and cut_off == 1.0):
            strong = abs(correlation) >= 0.5
            verdict = "the reward leans on length" if strong else "length explains little of it"
            sentences.append(
                f"Reward and length of {NAMES.get(name, name)} correlate at "
                f"{fixed(correlation, 2, sign=True)}: {verdict}."
            )
    return sentences


def _tokens(audit: Json) -> list[tuple[str, str, str, str]]:
    rows = [row for row in sequence(audit, "top_tokens") if isinstance(row, dict)]
    cells = []
    for row in rows[:MOST_TOKENS]:
        share = number(row.get("share"))
        cells.append(
            (
                visible(str(row.get("token", "–"))),
                plain(number(row.get("count"))),
                fixed(number(row.get("mean")), 2, sign=True),
                "–" if share is None else fixed(100 * share, 1),
            )
        )
    return cells


def _curve(curve: Json) -> Markup | None:
    pairs = zip(sequence(curve, "lams"), sequence(curve, "nll"), strict=False)
    numeric = [(number(lam), number(nll)) for lam, nll in pairs]
    points = sorted((lam, nll) for lam, nll in numeric if lam is not None and nll is not None)
    if len(points) < 2:
        return None
    star, recipe = number(curve.get("lam_star")), number(curve.get("lam_recipe"))
    marks = []
    if star is not None:
        marks.append((f"λ* = {plain(star)}", star, "sft"))
    if recipe is not None:
        marks.append((f"recipe λ = {plain(recipe)}", recipe, "policy"))
    lams, nll = [lam for lam, _ in points], [nll for _, nll in points]
    label = "Held-out NLL in nats per response against λ: " + ", ".join(
        f"{plain(a)} at {plain(b)}" for b, a in points
    )
    return figures.lambda_curve("lambda", label, lams, nll, marks)


def _reading(curve: Json) -> list[str]:
    """What the λ-curve says about the recipe, in plain words."""
    star, recipe = number(curve.get("lam_star")), number(curve.get("lam_recipe"))
    sft, at_recipe = number(curve.get("nll_sft")), number(curve.get("nll_recipe"))
    sentences = []
    if star is not None and star <= 1:
        sentences.append(
            f"The curve is lowest at λ* = {plain(star)}: this SFT model has nothing left to "
            "extrapolate, and SRPPO is not expected to help."
        )
    elif star is not None:
        sentences.append(
            f"The curve is lowest at λ* = {plain(star)}: held-out demonstrations are best "
            f"predicted that far along the line from base (0) through sft (1). With sft as the "
            f"reference this is β = 1/(λ* − 1) = {plain(1 / (star - 1), 2)}."
        )
    if recipe is not None and sft is not None and at_recipe is not None:
        cost = f"{plain(at_recipe)} nats per response against {plain(sft)} under sft"
        if at_recipe < sft and (star is None or recipe <= star):
            verdict = "the log-ratio carries that far, and the recipe is supported."
        elif at_recipe < sft:
            verdict = "past the best λ, but the log-ratio still carries that far."
        else:
            verdict = (
                "that is farther than the log-ratio supports. Expect accuracy to fall on prompts "
                "like the demonstrations; a larger β, or a shorter SFT, brings λ back."
            )
        sentences.append(f"At the recipe's λ = {plain(recipe)} they cost {cost}: {verdict}")
    return sentences
