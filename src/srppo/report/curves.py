"""The curves over steps: which, in what unit, and what a healthy one looks like."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from srppo.report import figures
from srppo.report.numbers import plain
from srppo.report.read import Json, RunFiles, number

Limits = tuple[float | None, float | None]


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One logged quantity. `scale` turns the logged number into `unit`."""

    key: str
    title: str
    unit: str
    healthy: str
    scale: float = 1.0
    ylim: Limits | None = None


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One small multiple, ready for the page."""

    title: str
    unit: str
    healthy: str
    svg: Markup
    change: str
    """First and last value; empty where there are several lines."""
    legend: list[tuple[str, str]]
    """(series, label) of each line; empty where there is only one."""


PPO = [
    Spec(
        key="reward",
        title="Reward",
        unit="nats per response",
        healthy="Rises, then levels off as the KL penalty balances it. The band is one standard "
        "deviation over responses.",
    ),
    Spec(
        key="objective",
        title="Objective J",
        unit="nats per response",
        healthy="Rises and levels off. J is what is optimised, not what is wanted: hold it "
        "against the evaluation.",
    ),
    Spec(
        key="kl_sft",
        title="KL to sft",
        unit="nats per response",
        healthy="Grows from 0 and levels off by itself. A climb without end means that β is too "
        "small for this reward.",
    ),
    Spec(
        key="kl_base",
        title="KL to base",
        unit="nats per response",
        healthy="Starts at the distance from sft to base and follows the KL to sft.",
    ),
    Spec(
        key="response_length",
        title="Response length",
        unit="tokens",
        healthy="Stays near that of the demonstrations. Steady growth or shrinking means that "
        "reward is collected through length.",
    ),
    Spec(
        key="eos_rate",
        title="EOS rate",
        unit="% of responses",
        healthy="Rises towards 100 %. A fall means that responses run into the length limit.",
        scale=100,
        ylim=(0, 104),
    ),
    Spec(
        key="entropy",
        title="Entropy",
        unit="nats per token",
        healthy="Falls slowly. A plunge to 0 means that the policy gives the same response "
        "every time.",
        ylim=(0, None),
    ),
    Spec(
        key="value_explained_variance",
        title="Value explained variance",
        unit="1 = perfect critic",
        healthy="Poor at first, then rises. A critic that stays below 0 adds noise to the "
        "updates. Values under −1 are cut off.",
        ylim=(-1.05, 1.05),
    ),
]
FURTHER = [
    Spec(
        key="clip_fraction",
        title="Clipped ratios",
        unit="% of tokens",
        healthy="A few per cent; tens of per cent mean that the steps are too large.",
        scale=100,
        ylim=(0, None),
    ),
    Spec(
        key="grad_norm",
        title="Gradient norm",
        unit="before clipping",
        healthy="Steady, without spikes that coincide with a jump in KL.",
        ylim=(0, None),
    ),
    Spec(
        key="length_reward_corr",
        title="Correlation of length and reward",
        unit="−1 to 1",
        healthy="Stays moderate. Near ±1, the reward is little more than a measure of length.",
        ylim=(-1.05, 1.05),
    ),
    Spec(
        key="saturated_fraction",
        title="Saturated log-ratios",
        unit="% of tokens",
        healthy="Stays near 0: few tokens meet the per-token clip.",
        scale=100,
        ylim=(0, None),
    ),
    Spec(
        key="sampler_logprob_diff",
        title="Sampler against trainer",
        unit="nats, mean absolute difference",
        healthy="Stays close to 0: both see the same probabilities.",
        ylim=(0, None),
    ),
]
SFT = Spec(
    key="loss",
    title="SFT loss",
    unit="nats per token",
    healthy="Falls fast, then flattens. Near 0, the demonstrations are memorised and the reward "
    "has little left to say.",
    ylim=(0, None),
)


ROUNDING = 1e-6
"""What is less than that share of a curve's largest value is said to be 0: float32 has no more."""
UNITS = {spec.key: spec.unit for spec in PPO if spec.scale == 1}
"""Units of evaluation metrics that are never a share, however their values fall."""


def panels(files: RunFiles) -> tuple[list[Panel], list[Panel]]:
    """The main curves and the further ones; a quantity that was not logged has no panel."""
    main = [_single("ppo", spec, files.ppo) for spec in PPO]
    main += _evaluations(files.ppo)
    main.append(_single("sft", SFT, files.sft))
    further = [_single("ppo", spec, files.ppo) for spec in FURTHER]
    return [p for p in main if p is not None], [p for p in further if p is not None]


def series(rows: Sequence[Json], key: str, scale: float = 1.0) -> tuple[list[float], list[float]]:
    """Steps and values of the rows in which `key` is a finite number."""
    points = [(number(row.get("step")), number(row.get(key))) for row in rows]
    kept = [(x, y) for x, y in points if x is not None and y is not None]
    return [x for x, _ in kept], [scale * y for _, y in kept]


def _single(stage: str, spec: Spec, rows: Sequence[Json]) -> Panel | None:
    x, y = series(rows, spec.key, spec.scale)
    if not x:
        return None
    steps, spread = series(rows, f"{spec.key}_std", spec.scale)
    band = steps == x
    line = figures.Line(
        x=x,
        y=y,
        colour=stage if stage == "sft" else "policy",
        low=[a - s for a, s in zip(y, spread, strict=True)] if band else None,
        high=[a + s for a, s in zip(y, spread, strict=True)] if band else None,
    )
    least = ROUNDING * max(map(abs, y))
    ends = [plain(v if abs(v) >= least else 0.0) for v in (y[:1] if len(y) == 1 else (y[0], y[-1]))]
    change = " → ".join(ends)
    label = f"{spec.title}, {spec.unit}, over {len(x)} steps: {change}"
    return Panel(
        title=spec.title,
        unit=spec.unit,
        healthy=spec.healthy,
        svg=figures.panel(f"{stage}-{spec.key}", label, [line], spec.ylim),
        change=change,
        legend=[],
    )


def _evaluations(rows: Sequence[Json]) -> list[Panel]:
    """One panel per metric of the keys eval/<metric>/<group>, one line per group."""
    metrics: dict[str, dict[str, str]] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        prefix, _, rest = key.partition("/")
        metric, _, group = rest.partition("/")
        if prefix == "eval" and metric and series(rows, key)[0]:
            metrics.setdefault(metric, {})[group or "all"] = key
    panels = []
    for i, (metric, keys) in enumerate(metrics.items()):
        drawn = {group: series(rows, key) for group, key in keys.items()}
        share = metric not in UNITS and all(0 <= y <= 1 for _, ys in drawn.values() for y in ys)
        lines = [
            figures.Line(
                x=x, y=[100 * v for v in y] if share else y, colour=str(j % 6 + 1), dash=j // 6
            )
            for j, (x, y) in enumerate(drawn.values())
        ]
        ends = ", ".join(f"{g} {plain(line.y[-1])}" for g, line in zip(drawn, lines, strict=True))
        panels.append(
            Panel(
                title=f"Evaluation: {metric.replace('_', ' ')}",
                unit="%" if share else UNITS.get(metric, ""),
                healthy="Rises along with the reward. Reward up and evaluation down is the mark "
                "of a reward that is being exploited.",
                svg=figures.panel(
                    f"eval-{i}",
                    f"{metric} by group over steps, at the end: {ends}",
                    lines,
                    (0, 104) if share else None,
                ),
                change="",
                legend=[(str(j % 6 + 1), group) for j, group in enumerate(drawn)],
            )
        )
    return panels
