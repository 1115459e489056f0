"""A study's means over seeds as one SVG file, that stands by itself. Same input, same bytes."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

if TYPE_CHECKING:
    from srppo.report.study import Over

COLOURS = ("#00695c", "#c05a00", "#5b3f9e", "#8a8a8a", "#b3261e")
MARKERS = "osD^v"


def figure(found: list[Over], score: str) -> str:
    """A panel a group, a row a model of a variant, a mark a decoding: mean and 95% interval."""
    chosen = [over for over in found if over.cell.score == score and over.cell.model != "base"]
    groups = list(dict.fromkeys(over.cell.group for over in chosen))
    decodings = list(dict.fromkeys(over.cell.decoding for over in chosen))
    several = len({over.cell.variant for over in chosen}) > 1
    names = {
        (c.variant, c.model): f"{c.variant} / {c.model}" if several else c.model
        for c in (over.cell for over in chosen)
    }
    place = {name: -y for y, name in enumerate(names)}
    style = {"svg.hashsalt": score, "svg.fonttype": "none", "font.size": 9, "grid.alpha": 0.3}
    with matplotlib.style.context(["default", style]):
        size = (2.2 + 2.4 * len(groups), 0.8 + 0.2 * len(names))
        drawing = Figure(size, layout=ConstrainedLayoutEngine())
        panels = drawing.subplots(1, len(groups), sharey=True, squeeze=False)[0]
        for axes, group in zip(panels, groups, strict=True):
            for i, decoding in enumerate(decodings):
                mine = [o for o in chosen if (o.cell.group, o.cell.decoding) == (group, decoding)]
                axes.errorbar(
                    [over.interval.mean for over in mine],
                    [place[over.cell.variant, over.cell.model] - 0.12 * i for over in mine],
                    xerr=[over.interval.half for over in mine],
                    ls="",
                    marker=MARKERS[i % len(MARKERS)],
                    color=COLOURS[i % len(COLOURS)],
                    ms=3.5,
                    lw=1,
                    label=decoding,
                )
            axes.set_title(group, fontsize=9)
            axes.grid(axis="both")
            axes.set_xlabel(score)
        panels[0].set_yticks(list(place.values()), list(names.values()))
        panels[-1].legend(fontsize=8)
        return svg(drawing)


def svg(drawing: Figure) -> str:
    """As text, without a date."""
    buffer = io.StringIO()
    drawing.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
