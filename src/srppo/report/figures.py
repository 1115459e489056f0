"""Inline SVG drawn with matplotlib. Colours are CSS variables of the page, so that they follow
its light or dark mode; text stays text, in the page's own font. Same input, same bytes.

matplotlib knows no CSS, so it draws with the stand-in colours below and `_inline` swaps them.
"""

import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise

import matplotlib.style
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

INK = "#010100"
_CSS = {INK: "currentColor"}
SERIES: dict[str, str] = {}
for _i, _name in enumerate(["base", "sft", "policy", "demonstrations", *"123456"], 1):
    SERIES[_name] = f"#0101{_i:02x}"
    _CSS[SERIES[_name]] = f"var(--s-{_name})"

_STYLE = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": INK,
    "grid.alpha": 0.14,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "xtick.major.width": 0.6,
    "font.size": 9,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "text.color": INK,
    "text.parse_math": False,
    "svg.fonttype": "none",
}
_DASHES = ["-", (0, (4, 1.5)), (0, (1.2, 1.5))]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One series of a panel; `low` and `high` bound a shaded band around it."""

    x: Sequence[float]
    y: Sequence[float]
    colour: str = "policy"
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dash: int = 0


def panel(
    name: str, label: str, lines: Sequence[Line], ylim: tuple[float | None, float | None] | None
) -> Markup:
    """Small multiple of one quantity over steps. `name` is unique in the page, `label` is read
    aloud in place of the picture."""
    with _style(name):
        figure, (axes,) = _figure(3.9, 2.0)
        for line in lines:
            colour = SERIES[line.colour]
            if line.low is not None and line.high is not None:
                axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, lw=0)
            marker = "o" if len(line.x) <= 12 else ""
            axes.plot(line.x, line.y, color=colour, marker=marker, ms=3, ls=_DASHES[line.dash % 3])
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        axes.set_xlabel("step")
        if ylim is not None:
            axes.set_ylim(*ylim)
        return _inline(figure, name, label)


def histograms(
    name: str,
    label: str,
    rows: Sequence[tuple[str, str, Sequence[float], Sequence[float], float | None]],
) -> Markup:
    """Histograms under each other on one axis: rows of (series, words, edges, counts, mean). Each
    bar's height is its density, relative to the tallest bar of its row."""
    with _style(name):
        figure, grid = _figure(4.6, 0.8 * len(rows) + 0.5, rows=len(rows))
        for axes, (series, words, edges, counts, mean) in zip(grid, rows, strict=True):
            heights = [c / (b - a) for c, (a, b) in zip(counts, pairwise(edges), strict=True)]
            tallest = max(heights) or 1.0
            colour = SERIES[series]
            axes.stairs([h / tallest for h in heights], edges, fill=True, color=colour, alpha=0.75)
            if mean is not None:
                axes.axvline(mean, color=INK, lw=1, ymax=0.95)
            axes.set_title(words, loc="left", size=9, pad=2)
            axes.grid(visible=False)
            axes.set_yticks([])
            axes.set_ylim(0, 1.05)
            axes.tick_params(labelbottom=axes is grid[-1])
        grid[-1].set_xlabel("reward, nats per response")
        return _inline(figure, name, label)


def lambda_curve(
    name: str,
    label: str,
    lams: Sequence[float],
    nll: Sequence[float],
    marks: Sequence[tuple[str, float, str]],
) -> Markup:
    """Held-out NLL against lambda; marks are (text, lambda, series) drawn as vertical lines.
    The vertical scale is logarithmic once the largest NLL is 20 times the smallest."""
    with _style(name):
        figure, (axes,) = _figure(4.6, 2.4)
        if min(nll) > 0 and max(nll) > 20 * min(nll):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.plot(lams, nll, color=INK, marker="o", ms=3.5)
        axes.margins(y=0.15)
        far = min(lams) + 0.7 * (max(lams) - min(lams))
        for i, (text, lam, series) in enumerate(marks):
            axes.axvline(lam, color=SERIES[series], lw=1.4, ls=_DASHES[i % 3])
            right = lam > far
            axes.annotate(
                text,
                (lam, 1.0 - 0.1 * i),
                (-4 if right else 4, 0),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="right" if right else "left",
                va="top",
                color=SERIES[series],
            )
        axes.set_xlabel("λ  (0 = base, 1 = sft)")
        return _inline(figure, name, label)


def strip(name: str, label: str, points: Sequence[tuple[str, float, float, float]]) -> Markup:
    """One group's score on a scale from 0 to 100 %: points are (series, share, low, high)."""
    with _style(name):
        figure, (axes,) = _figure(4.4, 0.16 * len(points) + 0.3)
        for y, (series, share, low, high) in enumerate(reversed(points)):
            colour = SERIES[series]
            axes.plot([100 * low, 100 * high], [y, y], color=colour, lw=4, alpha=0.35)
            axes.plot([100 * share], [y], color=colour, marker="o", ms=5, ls="")
        axes.set_xlim(-2, 102)
        axes.set_ylim(-0.7, len(points) - 0.3)
        axes.set_xticks([0, 25, 50, 75, 100], ["0", "", "50", "", "100 %"])
        axes.set_yticks([])
        axes.grid(axis="x", visible=True)
        return _inline(figure, name, label)


def forest(
    name: str,
    label: str,
    points: Sequence[tuple[str, float, float | None, float | None]],
    reach: tuple[float, float],
) -> Markup:
    """Differences in points with their intervals about a line at 0: points are (series,
    difference, low, high), `reach` is what the axis shows."""
    with _style(name):
        figure, (axes,) = _figure(4.4, 0.16 * len(points) + 0.3)
        axes.axvline(0, color=INK, lw=1)
        for y, (series, difference, low, high) in enumerate(reversed(points)):
            colour = SERIES[series]
            if low is not None and high is not None:
                axes.plot([low, high], [y, y], color=colour, lw=4, alpha=0.35)
            axes.plot([difference], [y], color=colour, marker="o", ms=5, ls="")
        margin = 0.04 * (reach[1] - reach[0])
        axes.set_xlim(reach[0] - margin, reach[1] + margin)
        axes.set_ylim(-0.7, len(points) - 0.3)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:+g}".replace("-", "−") if x else "0")
        axes.set_yticks([])
        axes.grid(axis="x", visible=True)
        return _inline(figure, name, label)


def _style(name: str) -> AbstractContextManager[None]:
    """The style above over matplotlib's defaults, whatever the user's matplotlibrc says."""
    return matplotlib.style.context(["default", {**_STYLE, "svg.hashsalt": name}])


def _figure(width: float, height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of `width` x `height` inches and its axes, one under the other."""
    figure = Figure((width, height), layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02))
    return figure, list(figure.subplots(rows, sharex=True, squeeze=False)[:, 0])


def _inline(figure: Figure, name: str, label: str) -> Markup:
    """The figure as an <svg> element to stand inside HTML: no prologue, no metadata (dates), no
    style sheet, no group ids (both would reach past the figure), colours and font of the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    width, height = (float(x) for x in re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0])
    body = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace("xlink:href", "href")
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = re.sub(r"#0101[0-9a-f]{2}", lambda match: _CSS[match[0]], body)
    body = re.sub(r"\s*\n\s*", "\n", body)
    head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}" data-name="{}">')
    return head.format(f"{width:g}", f"{height:g}", label, name) + Markup(body) + Markup("</svg>")
