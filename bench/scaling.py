"""What doubling the work costs: our step's time and memory against the formula of docs/cost.md.

    .venv/bin/python bench/scaling.py [--rounds 3]

Around one case, responses, their length, vocabulary, layers and width are halved and doubled, one
at a time. The formula's few rates are fitted to the measurements; each point is predicted from the
others alone. Writes scaling.jsonl and scaling.svg to runs/bench/.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from case import Case
from run import build, measure
from srppo.train.cost import Shape, step_flops

CENTRE = Case(prompts=32, response_tokens=64, early=False)
AXES = {
    "prompts": "responses",
    "response_tokens": "response length",
    "vocab": "vocabulary",
    "layers": "layers",
    "width": "width",
}
MICROBATCH = 2048
"""Tokens: as ours.py sets it."""
PHASES = ("rollout", "scoring", "update")
ALLOWED = 0.15


@dataclass(frozen=True)
class Point:
    """One case, measured."""

    case: Case
    seconds: dict[str, float]
    """CPU seconds of each phase."""
    peak_mb: float


def cases() -> list[Case]:
    """The centre, and each axis halved and doubled."""
    half_and_double = [
        replace(CENTRE, **{axis: int(getattr(CENTRE, axis) * factor)})
        for axis in AXES
        for factor in (0.5, 2)
    ]
    return [CENTRE, *half_and_double]


def shape_of(case: Case) -> Shape:
    """Of the Llama that workload.py makes."""
    per_layer = 4 * case.width**2 + 3 * case.width * case.intermediate
    return Shape(
        block=case.layers * per_layer,
        attention=case.layers * case.width,
        head=case.width * case.vocab,
    )


def parameters(case: Case) -> int:
    """Of one model, embeddings included."""
    shape = shape_of(case)
    return shape.block + 2 * shape.head


def time_terms(case: Case, phase: str) -> list[float]:
    """What a phase's seconds are proportional to, each with a rate of its own (docs/cost.md)."""
    N, P, T = case.prompts, case.prompt_tokens, case.response_tokens
    flops = step_flops(shape_of(case), [P] * N, [T] * N)
    passes = {"rollout": 1, "scoring": 2, "update": 3}[phase]
    calls = {"rollout": T * case.layers, "scoring": 0, "update": 0}[phase]
    trained = parameters(case) if phase == "update" else 0
    return [
        getattr(flops, phase) / 1e9,
        passes * N * T * case.vocab / 1e9,
        passes * N * (P + T) * case.layers * case.width / 1e9,
        calls / 1e3 + trained / 1e9,
    ]


def memory_terms(case: Case) -> list[float]:
    """What the peak is a sum of, each times a constant: MB, and 1 for the process itself."""
    tokens = min(MICROBATCH, case.prompts * (case.prompt_tokens + case.response_tokens))
    floats = [parameters(case), tokens * case.layers * case.width]
    return [1.0, *(4 * n / 2**20 for n in floats)]


def fitted(terms: NDArray, measured: NDArray) -> NDArray:
    """Non-negative rates that make the relative error of `terms @ rates` least."""
    return nnls(terms / measured[:, None], np.ones(len(measured)))[0]


def predicted_from_others(terms: NDArray, measured: NDArray) -> NDArray:
    """Each measurement by rates fitted to all the others."""
    some = np.arange(len(measured))
    return np.array([terms[i] @ fitted(terms[some != i], measured[some != i]) for i in some])


def measure_points(rounds: int, out: Path) -> list[Point]:
    """In interleaved rounds; medians over them."""
    found: dict[Case, list[dict]] = {case: [] for case in cases()}
    with tempfile.TemporaryDirectory() as scratch, out.open("w") as file:
        for round_ in range(rounds):
            for number, (case, lines) in enumerate(found.items()):
                directory = Path(scratch) / str(number)
                if round_ == 0:
                    build(case, directory)
                print(case, file=sys.stderr)
                lines.append(measure("ours-ppo", directory, steps=2, seed=round_))
                file.write(json.dumps(vars(case) | lines[-1]) + "\n")
                file.flush()
    return [
        Point(
            case,
            {p: median(phase_seconds(line, p) for line in lines) for p in PHASES},
            median(line["peak_mb"] for line in lines),
        )
        for case, lines in found.items()
    ]


def phase_seconds(line: dict, phase: str) -> float:
    """CPU seconds, by the phase's share of the wall time."""
    (cpu,), (wall,), (spent,) = line["cpu_seconds"], line["wall_seconds"], line["phases"][phase]
    return cpu * spent / wall


def compare(points: list[Point]) -> tuple[NDArray, NDArray]:
    """Print each point beside its prediction; seconds and MB predicted."""
    seconds = np.zeros(len(points))
    for phase in PHASES:
        terms = np.array([time_terms(point.case, phase) for point in points])
        measured = np.array([point.seconds[phase] for point in points])
        seconds += predicted_from_others(terms, measured)
        print(f"{phase}: s per unit of each term {fitted(terms, measured).round(4)}")
    terms = np.array([memory_terms(point.case) for point in points])
    measured = np.array([point.peak_mb for point in points])
    print(f"memory: MB, and copies of each term {fitted(terms, measured).round(2)}")
    mb = predicted_from_others(terms, measured)
    print(
        "\n| changed | s | by the formula | off | peak MB | by the formula | off |\n"
        + "|---" * 7
        + "|"
    )
    errors = []
    for point, s, m in zip(points, seconds, mb, strict=True):
        total = sum(point.seconds.values())
        errors += [s / total - 1, m / point.peak_mb - 1]
        print(
            f"| {changed(point.case)} | {total:.2f} | {s:.2f} | {errors[-2]:+.0%} "
            f"| {point.peak_mb:.0f} | {m:.0f} | {errors[-1]:+.0%} |"
        )
    within = sum(abs(error) <= ALLOWED for error in errors)
    print(f"\n{within} of {len(errors)} within {ALLOWED:.0%}")
    return seconds, mb


def changed(case: Case) -> str:
    """How a case differs from the centre."""
    names = [
        f"{AXES[a]} {getattr(case, a)}" for a in AXES if getattr(case, a) != getattr(CENTRE, a)
    ]
    return names[0] if names else "nothing"


def plot(points: list[Point], seconds: NDArray, mb: NDArray, path: Path) -> None:
    """A column per axis: measured points, and the formula from the others as a line."""
    figure, rows = plt.subplots(2, len(AXES), figsize=(14, 6), sharey="row", layout="constrained")
    shown: list[tuple[str, Callable[[Point], float], NDArray]] = [
        ("CPU s a step", lambda point: sum(point.seconds.values()), seconds),
        ("peak MB", lambda point: point.peak_mb, mb),
    ]
    for row, (label, value, formula) in zip(rows, shown, strict=True):
        for plane, (axis, title) in zip(row, AXES.items(), strict=True):
            only = [
                i
                for i, p in enumerate(points)
                if replace(p.case, **{axis: 0}) == replace(CENTRE, **{axis: 0})
            ]
            only.sort(key=lambda i: getattr(points[i].case, axis))
            x = [getattr(points[i].case, axis) for i in only]
            plane.plot(x, [value(points[i]) for i in only], "o", label="measured")
            plane.plot(x, formula[only], "-", label="formula, from the other points")
            plane.set_xscale("log", base=2)
            plane.set_yscale("log", base=2)
            plane.set_xticks(x, x)
            plane.yaxis.set_major_formatter("{x:g}")
            plane.set_xlabel(title)
        row[0].set_ylabel(label)
    figure.legend(*rows[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    points = measure_points(args.rounds, args.out / "scaling.jsonl")
    plot(points, *compare(points), args.out / "scaling.svg")
    print(f"The plot: {args.out / 'scaling.svg'}")


if __name__ == "__main__":
    main()
