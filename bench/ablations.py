"""What each setting of an ablation study does to SRPPO, paired by seed.

    srppo reproduce ablations --jobs 2
    .venv/bin/python bench/ablations.py runs/ablations --control sft-20-epochs

For each decoding a table with a row a variant: its SFT model, what SRPPO adds to it, and by how
much its SRPPO model differs from the recipe's, and from the SFT model of the variant `--control`.
A cell has all groups, in points; a star stands where the 95% interval over seeds excludes 0.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from srppo.report.summary import Interval

Values = dict[tuple[str, str, str, str], dict[str, float]]
"""(variant, model, decoding, group): by seed, in points."""


def read(path: Path) -> tuple[Values, str]:
    """Those of a study's table.json, of the score that its rows name first; that score."""
    cells = json.loads(path.read_text())["cells"]
    score = cells[0]["score"]
    return {
        (c["variant"], c["model"], c["decoding"], c["group"]): {
            seed: 100 * value for seed, value in c["values"].items()
        }
        for c in cells
        if c["score"] == score
    }, score


def difference(ours: dict[str, float], theirs: dict[str, float]) -> str:
    """Over the seeds that both have."""
    change = Interval.of([ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()])
    star = "*" if abs(change.mean) > change.half else ""
    return f"{change.mean:+.0f} ± {change.half:.0f}{star}"


def table(values: Values, decoding: str, control: str) -> str:
    """A row a variant, in the study's order."""
    groups = list(dict.fromkeys(group for *_, group in values))
    variants = list(dict.fromkeys(variant for variant, *_ in values))
    lines = [f"| variant | n | SFT | SRPPO adds | than the recipe's | than {control}'s SFT |"]
    lines += ["| --- " * 6 + "|"]
    for variant in variants:
        sft, policy, recipe, longer = (
            [values[v, model, decoding, group] for group in groups]
            for v, model in (
                (variant, "sft"),
                (variant, "policy"),
                ("recipe", "policy"),
                (control, "sft"),
            )
        )
        alone = " / ".join(f"{Interval.of(list(of.values())).mean:.0f}" for of in sft)
        against = [
            " / ".join(difference(a, b) for a, b in zip(policy, of, strict=True))
            for of in (sft, recipe, longer)
        ]
        lines.append(f"| {variant} | {len(policy[0])} | {alone} | {' | '.join(against)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--control", required=True)
    options = parser.parse_args()
    values, score = read(options.study / "table.json")
    groups = list(dict.fromkeys(group for *_, group in values))
    for decoding in dict.fromkeys(decoding for _, _, decoding, _ in values):
        print(f"## {score}, {decoding}: {' / '.join(groups)}\n")
        print(table(values, decoding, options.control), end="\n\n")


if __name__ == "__main__":
    main()
