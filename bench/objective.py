"""How many steps each way of training needs, over runs of one recipe: from their own metrics.

    .venv/bin/python bench/objective.py runs/miniature-table/seed=?

For every run, the policy and its `ppo` controls: the first step at which J, averaged over three
steps, has come 90% and 95% of the way from where all start to the best one's last five steps. Mean
over runs with its 95% interval, and how many times as many as the alphabet's first (all-action).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import t as student

SHARES = (0.9, 0.95)


def objectives(run_dir: Path) -> dict[str, list[float]]:
    """J of every step, by name, from the end of the alphabet."""
    files = [run_dir / "metrics" / "ppo.jsonl", *(run_dir / "metrics" / "controls").glob("*.jsonl")]
    found = {}
    for file in files:
        steps = [json.loads(line) for line in file.read_text().splitlines()]
        if "objective" in steps[0]:
            found["policy" if file.stem == "ppo" else file.stem] = [s["objective"] for s in steps]
    return dict(sorted(found.items(), reverse=True))


def steps_to(curves: dict[str, list[float]], share: float) -> dict[str, float]:
    """The first step that is so far; one more than there are if none is."""
    start = mean(curve[0] for curve in curves.values())
    goal = start + share * (max(mean(curve[-5:]) for curve in curves.values()) - start)
    reached = {}
    for name, curve in curves.items():
        smooth = [mean(curve[max(0, i - 2) : i + 1]) for i in range(len(curve))]
        hits = [i + 1 for i, value in enumerate(smooth) if value >= goal]
        reached[name] = hits[0] if hits else len(curve) + 1
    return reached


def interval(values: list[float]) -> str:
    half = student.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
    return f"{mean(values):.2f} ± {half:.2f}"


def main() -> None:
    runs = [objectives(Path(directory)) for directory in sys.argv[1:]]
    if len(runs) < 2:
        sys.exit("an interval needs at least two run directories: name them all")
    for share in SHARES:
        reached = [steps_to(curves, share) for curves in runs]
        reference = list(reached[0])[-1]
        for name in reached[0]:
            ratios = [found[name] / found[reference] for found in reached]
            print(
                f"{share:.0%}  {name:12} steps {interval([found[name] for found in reached]):14} "
                f"times {reference}: {interval(ratios)}"
            )


if __name__ == "__main__":
    main()
