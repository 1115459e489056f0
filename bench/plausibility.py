"""What `ppo.plausibility` changes, over the 20 ways to fine-tune of the λ-study, paired by run.

    srppo reproduce lambda-curve --jobs 2
    srppo reproduce lambda-curve ppo.plausibility=0.1 --out runs/lambda-plausible --jobs 2
    .venv/bin/python bench/plausibility.py runs/lambda-curve runs/lambda-plausible

Both have the same SFT models. A cell is accuracy in %, in domain / PPO prompts / unseen; a star
stands where the 95% interval over seeds of the difference to the run without the bound excludes 0.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from srppo.miniature.world import GROUPS
from srppo.report.summary import Interval

MODELS = {"policy": "β = 0.2", "beta-0.5": "β = 0.5", "auto": "auto"}
DECODINGS = ("T=1", "greedy")

Run = dict[tuple[str, str, str], float]
"""(model, decoding, group) -> accuracy, the SFT model's where the audit found no β for `auto`."""


def read(path: Path) -> Run:
    """One run's results."""
    rows = json.loads((path / "results.json").read_text())["rows"]
    run = {(r["model"], r["decoding"], r["group"]): r["scores"]["accuracy"] for r in rows}
    for decoding in DECODINGS:
        for group in GROUPS:
            run.setdefault(("auto", decoding, group), run["sft", decoding, group])
    return run


def cell(before: list[Run], after: list[Run], model: str, decoding: str) -> str:
    """Means over seeds of `after`, starred against `before`."""
    said = []
    for group in GROUPS:
        key = model, decoding, group
        change = Interval.of([b[key] - a[key] for a, b in zip(before, after, strict=True)])
        star = "*" if abs(change.mean) > change.half else ""
        said.append(f"{100 * np.mean([run[key] for run in after]):.0f}{star}")
    return " / ".join(said)


def table(variants: dict[str, tuple[list[Run], list[Run]]], decoding: str) -> str:
    """A row a way to fine-tune."""
    lines = ["| SFT | alone | β = 0.2 | bounded | β = 0.5 | bounded | auto | bounded |"]
    lines += ["| --- " * 8 + "|"]
    for variant, (plain, bounded) in variants.items():
        cells = [cell(plain, plain, "sft", decoding)]
        for model in MODELS:
            cells += [cell(plain, plain, model, decoding), cell(plain, bounded, model, decoding)]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def means(plain: list[Run], bounded: list[Run]) -> str:
    """Over all runs; and the worst loss of one, over groups, against its SFT model."""
    lines = ["| | decoding | SFT | without | bounded | worst loss without | worst loss bounded |"]
    lines += ["| --- " * 7 + "|"]
    for model, name in MODELS.items():
        for decoding in DECODINGS:
            found, worst = [], []
            for model_, runs in (("sft", plain), (model, plain), (model, bounded)):
                values = np.array([[run[model_, decoding, g] for g in GROUPS] for run in runs])
                sft = np.array([[run["sft", decoding, g] for g in GROUPS] for run in runs])
                found.append(" / ".join(f"{100 * x:.0f}" for x in values.mean(0)))
                worst.append(f"{100 * (values - sft).mean(1).min():+.0f}")
            lines.append(f"| {name} | {decoding} | {' | '.join([*found, *worst[1:]])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("plain", type=Path)
    parser.add_argument("bounded", type=Path)
    options = parser.parse_args()
    variants: dict[str, tuple[list[Run], list[Run]]] = {}
    for path in sorted(options.bounded.glob("*__seed=*/results.json")):
        name = path.parent.name
        before, after = variants.setdefault(name.partition("__seed=")[0], ([], []))
        before.append(read(options.plain / name))
        after.append(read(path.parent))
    every = [[run for pair in variants.values() for run in pair[i]] for i in (0, 1)]
    print(f"{len(every[0])} runs of {len(variants)} ways to fine-tune\n")
    print(means(*every))
    for decoding in DECODINGS:
        print(f"\n## {decoding}: {' / '.join(GROUPS)}\n", table(variants, decoding), sep="\n")


if __name__ == "__main__":
    main()
