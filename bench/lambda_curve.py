"""Does the audit's curve foretell what SRPPO does? From the runs of `srppo reproduce lambda-curve`.

    srppo reproduce lambda-curve --jobs 2
    .venv/bin/python bench/lambda_curve.py runs/lambda-curve [--figure docs/lambda-curve.svg]

Prediction: NLL of held-out demonstrations at λ = 1 + 1/β less that at λ = 1, nats a response.
Outcome: accuracy of SRPPO with that β less that of its own SFT model. Beside it what that model's
NLL alone would foretell, for what is far from trained has more to gain. Spearman's correlation
over all runs; 95% intervals by resampling variants, each with all its seeds. A curve is also drawn
on the references of each group's validation prompts: eight of twelve families have no
demonstration. Where the audit found no β for `auto`, its outcome is that of the SFT model, which is
what it keeps.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from srppo.config import PPOConfig, parse_recipe
from srppo.config_data import SourceConfig
from srppo.data.chat import apply_template
from srppo.data.demonstrations import load_demonstrations
from srppo.data.sources import open_source
from srppo.miniature.world import GROUPS
from srppo.models.batching import Sequences
from srppo.models.load import load_tokenizer
from srppo.models.start import start_frozen
from srppo.report.study_figure import svg
from srppo.report.summary import Interval
from srppo.train.audit import STANDS_OUT, beta_at, lambda_curve

MODELS = {"policy": 6.0, "beta-0.5": 3.0, "auto": None}
"""Model: the λ that its β aims at; None: that of the audit."""
NAMES = {"policy": "β = 0.2", "beta-0.5": "β = 0.5", "auto": "auto", "sft": "SFT"}
DECODINGS = ("T=1", "greedy")
DRAWS = 2000


@dataclass(frozen=True)
class Run:
    """What one run found."""

    variant: str
    seed: int
    lam_star: float
    curves: dict[str, dict[float, float]]
    """Held-out demonstrations, and the references of each group: λ -> NLL."""
    accuracy: dict[tuple[str, str, str], float]
    """(model, decoding, group) -> share."""
    warned: bool
    """That the SFT model's own responses earn more than demonstrations."""

    def rise(self, lam: float, curve: str = "held_out") -> float:
        """NLL at λ less that at 1, nats a response."""
        return self.curves[curve][lam] - self.curves[curve][1.0]

    def gain(self, model: str, decoding: str, group: str) -> float:
        """Over its SFT model, which is what `auto` keeps where it finds no β."""
        before = self.accuracy["sft", decoding, group]
        return self.accuracy.get((model, decoding, group), before) - before

    def mean(self, model: str, decoding: str) -> float:
        """Accuracy over the groups."""
        of_sft = [self.accuracy["sft", decoding, group] for group in GROUPS]
        gains = [self.gain(model, decoding, group) for group in GROUPS] if model != "sft" else [0.0]
        return float(np.mean(of_sft) + np.mean(gains))


def read(path: Path) -> Run:
    """One run's directory."""
    findings = json.loads((path / "audit.json").read_text())
    audit, reward = findings["curve"], findings["reward"]
    noise = reward["sft"]["std"] / findings["prompts"] ** 0.5
    rows = json.loads((path / "results.json").read_text())["rows"]
    variant, _, seed = path.name.partition("__seed=")
    held_out = dict(zip(audit["lams"], audit["nll"], strict=True))
    return Run(
        variant,
        int(seed),
        audit["lam_star"],
        {"held_out": held_out, **by_group(path)},
        {(r["model"], r["decoding"], r["group"]): r["scores"]["accuracy"] for r in rows},
        reward["sft"]["mean"] - reward["demonstrations"]["mean"] > STANDS_OUT * noise,
    )


def by_group(path: Path) -> dict[str, dict[float, float]]:
    """The curve on the reference responses of each group's validation prompts; kept in the run."""
    kept = path / "curves.json"
    if not kept.is_file():
        recipe = parse_recipe(json.loads((path / "run.json").read_text())["recipe"])
        base, sft = start_frozen(recipe.model, path / "sft", recipe.seed)
        tokenizer = load_tokenizer(recipe.model.base)
        apply_template(tokenizer)
        source = SourceConfig(source=recipe.eval.prompts or "")
        rows, _ = load_demonstrations(
            open_source([source], seed=0, split="validation", columns={}),
            tokenizer,
            max_prompt_tokens=recipe.data.max_prompt_tokens,
            max_response_tokens=recipe.data.max_response_tokens,
            limit=None,
            seed=0,
            turns="all",
        )
        found = {}
        for group in GROUPS:
            some = [row for row in rows if row.meta["group"] == group][:160]
            y = Sequences.of([row.prompt_ids for row in some], [row.response_ids for row in some])
            curve = lambda_curve(base, sft, y, PPOConfig(kl_coef=0.2))
            found[group] = [curve["lams"], curve["nll"]]
        kept.write_text(json.dumps(found))
    return {
        group: dict(zip(*curve, strict=True))
        for group, curve in json.loads(kept.read_text()).items()
    }


def correlation(
    runs: list[Run], x: Callable[[Run], float], y: Callable[[Run], float]
) -> tuple[float, float, float]:
    """Spearman's ρ over runs, and its 95% interval: variants resampled with all their seeds."""
    clusters: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        clusters.setdefault(run.variant, []).append((x(run), y(run)))
    groups = [np.array(points) for points in clusters.values()]
    rng = np.random.default_rng(0)

    def rho(chosen: list[Any]) -> float:
        points = np.concatenate(chosen)
        return float(spearmanr(points[:, 0], points[:, 1]).statistic)

    draws = [
        rho([groups[i] for i in rng.integers(len(groups), size=len(groups))]) for _ in range(DRAWS)
    ]
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return rho(groups), float(low), float(high)


def correlations(runs: list[Run]) -> str:
    """Prediction against outcome, for each β, decoding and group."""
    lines = [
        "| β | decoding | outcome in | held-out curve | the group's own curve | SFT's NLL alone |"
    ]
    lines += ["| --- " * 6 + "|"]
    for model, lam in MODELS.items():
        if lam is None:
            continue
        for decoding in DECODINGS:
            for group in GROUPS:
                predictions: list[Callable[[Run], float]] = [
                    lambda run, lam=lam: run.rise(lam),
                    lambda run, lam=lam, group=group: run.rise(lam, group),
                    lambda run: run.curves["held_out"][1.0],
                ]
                cells = [
                    correlation(
                        runs, x, lambda run, m=model, d=decoding, g=group: run.gain(m, d, g)
                    )
                    for x in predictions
                ]
                said = [f"{rho:.2f} ({low:.2f} to {high:.2f})" for rho, low, high in cells]
                lines.append(f"| {NAMES[model]} | {decoding} | {group} | {' | '.join(said)} |")
    return "\n".join(lines)


def table(runs: dict[str, list[Run]], decoding: str) -> str:
    """A row a variant: the curve, the SFT model, and what each β adds; points, means over seeds."""
    lines = [
        "| SFT | NLL at 1 | λ* | NLL 6 − 1 | SFT | β = 0.2 | β = 0.5 | auto |",
        "| --- " * 8 + "|",
    ]
    for variant, some in runs.items():
        sft = " / ".join(f"{100 * _over(some, 'sft', decoding, g).mean:.0f}" for g in GROUPS)
        cells = [" / ".join(_points(_gain(some, m, decoding, g)) for g in GROUPS) for m in MODELS]
        stars = ", ".join(f"{run.lam_star:g}" for run in some)
        nll = np.mean([run.curves["held_out"][1.0] for run in some])
        rise = np.mean([run.rise(6.0) for run in some])
        lines.append(
            f"| {variant} | {nll:.2f} | {stars} | {rise:+.2f} | {sft} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def _over(some: list[Run], model: str, decoding: str, group: str) -> Interval:
    return Interval.of([run.accuracy[model, decoding, group] for run in some])


def _points(interval: Interval) -> str:
    """Rounded, with a star where the interval excludes 0."""
    star = "*" if abs(interval.mean) > interval.half else ""
    return f"{100 * interval.mean:+.0f}{star}"


def failures(runs: dict[str, list[Run]]) -> str:
    """Variants where the sign of the prediction is not that of the outcome."""
    lines = []
    for model, lam in MODELS.items():
        if lam is None:
            continue
        for group in GROUPS:
            gains = {v: _gain(some, model, "T=1", group) for v, some in runs.items()}
            wrong = {
                v: gain
                for v, gain in gains.items()
                if gain.mean * float(np.mean([run.rise(lam) for run in runs[v]])) > 0
            }
            lines.append(
                f"- {NAMES[model]}, T=1, {group}: {len(runs) - len(wrong)} of {len(runs)} signs "
                f"right. {_named(wrong)}"
            )
    return "\n".join(lines)


def _gain(some: list[Run], model: str, decoding: str, group: str) -> Interval:
    return Interval.of([run.gain(model, decoding, group) for run in some])


def _named(found: dict[str, Interval]) -> str:
    """Those that are sure, with their numbers; the others by name."""
    sure = {v: gain for v, gain in found.items() if abs(gain.mean) > gain.half}
    parts = {
        "Beyond the interval": [f"{v} {gain}" for v, gain in sure.items()],
        "Within it": [v for v in found if v not in sure],
    }
    said = [f"{words}: {', '.join(names)}." for words, names in parts.items() if names]
    return " ".join(said) or "None."


def own_responses(runs: list[Run]) -> str:
    """What became of those whose own responses earn more than demonstrations; T=1, in domain."""
    lines = []
    for model in ("policy", "beta-0.5"):
        for warned in (True, False):
            gains = [run.gain(model, "T=1", GROUPS[0]) for run in runs if run.warned == warned]
            harmed = sum(gain < 0 for gain in gains)
            lines.append(
                f"- {NAMES[model]}, {'earn more' if warned else 'earn less'}: {harmed} of "
                f"{len(gains)} runs end below their SFT model"
            )
    return "\n".join(lines)


def auto(runs: dict[str, list[Run]]) -> str:
    """Where `auto` ends below its SFT model, and what it is worth beside fixed ones."""
    lines = []
    every = [run for some in runs.values() for run in some]
    kept = sum(beta_at(run.lam_star, "sft") is None for run in every)
    lines.append(f"- In {kept} of {len(every)} runs the audit finds no β, and SFT is kept.")
    for decoding in DECODINGS:
        for group in GROUPS:
            gains = {v: _gain(some, "auto", decoding, group) for v, some in runs.items()}
            below = {v: gain for v, gain in gains.items() if gain.mean < 0}
            lines.append(f"- `auto` below SFT, {decoding}, {group}: {_named(below)}")
    for decoding in DECODINGS:
        names = ("sft", *MODELS)
        means = np.array([[run.mean(name, decoding) for name in names] for run in every])
        best = means.max(1, keepdims=True)
        said = [
            f"{NAMES[name]} {means[:, i].mean():.3f} (worst gain {worst:+.3f}, regret {regret:.3f})"
            for i, name in enumerate(names)
            for worst in [(means[:, i] - means[:, 0]).min()]
            for regret in [(best[:, 0] - means[:, i]).mean()]
        ]
        lines.append(f"- mean accuracy over runs and groups, {decoding}: {'; '.join(said)}")
    for decoding in DECODINGS:
        rho, low, high = correlation(
            every,
            lambda run: run.lam_star,
            lambda run, d=decoding: run.mean("policy", d) - run.mean("beta-0.5", d),
        )
        lines.append(
            f"- λ* against accuracy of β = 0.2 less that of 0.5, {decoding}: ρ = {rho:.2f} "
            f"({low:.2f} to {high:.2f})"
        )
    return "\n".join(lines)


def draw(runs: dict[str, list[Run]]) -> str:
    """What the curve says of λ = 6 against what β = 0.2 did at T=1; a point a variant."""
    figure = Figure((9.0, 3.2), layout="constrained")
    panels = figure.subplots(1, len(GROUPS), sharey=True)
    for axes, group in zip(panels, GROUPS, strict=True):
        for variant, some in runs.items():
            gain = _gain(some, "policy", "T=1", group)
            rises = [run.rise(6.0) for run in some]
            sgd = variant.startswith("sgd")
            axes.errorbar(
                float(np.mean(rises)),
                gain.mean,
                yerr=None if len(some) < 2 else gain.half,
                xerr=[[np.mean(rises) - min(rises)], [max(rises) - np.mean(rises)]],
                marker="o" if sgd else "s",
                color="#00695c" if sgd else "#c05a00",
                ms=4,
                lw=0.7,
            )
        axes.set_xscale("symlog", linthresh=1.0)
        axes.axhline(0, color="k", lw=0.7)
        axes.axvline(0, color="k", lw=0.7)
        axes.set_title(group, fontsize=9)
        axes.set_xlabel("NLL at λ = 6 less that at 1, nats", fontsize=8)
        axes.tick_params(labelsize=8)
    panels[0].set_ylabel("accuracy of β = 0.2 less SFT's, T=1", fontsize=8)
    panels[0].plot([], [], "o", color="#00695c", label="SGD")
    panels[0].plot([], [], "s", color="#c05a00", label="AdamW")
    panels[0].legend(fontsize=8)
    return svg(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    paths = sorted(options.runs.glob("*__seed=*/results.json"))
    found = [read(path.parent) for path in paths]
    runs: dict[str, list[Run]] = {}
    for run in found:
        runs.setdefault(run.variant, []).append(run)
    seeds = sorted({run.seed for run in found})
    print(f"{len(found)} runs: {len(runs)} variants, seeds {seeds}\n")
    print("## Rank correlations\n", correlations(found), sep="\n")
    print("\n## Signs\n", failures(runs), sep="\n")
    print("\n## Own responses against demonstrations\n", own_responses(found), sep="\n")
    print("\n## auto\n", auto(runs), sep="\n")
    for decoding in DECODINGS:
        print(f"\n## {decoding}: {' / '.join(GROUPS)}\n", table(runs, decoding), sep="\n")
    if options.figure:
        options.figure.write_text(draw(runs), encoding="utf-8")


if __name__ == "__main__":
    main()
