"""Curves as inline SVG that takes its colors from the page, in light and in dark."""

import io
import re
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLORS = 8  # of the page's style: var(--c0) ...
DASHES = ("-", "--", ":", "-.")
# Colors that matplotlib writes and the page's own take the place of.
_INK, _GRID = "#010203", "#040506"
_STYLE: Any = {
    "font.size": 11,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "blocksparse_jax",  # otherwise the ids are random
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _GRID,
}


class Curve(NamedTuple):
    """One run's line in a chart.

    Attributes:
      label: of the run.
      index: of the run, which gives the color and the dashes.
      x: epochs.
      y: values.
    """

    label: str
    index: int
    x: Sequence[float]
    y: Sequence[float]


def chart(title: str, curves: Sequence[Curve]) -> str:
    """Draws one number of several runs over the epochs.

    Args:
      title: what the number is.
      curves: of the runs that have it.

    Returns:
      An SVG element; its label says where each curve ends.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5, 3.1), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        for curve in curves:
            axes.plot(
                curve.x,
                curve.y,
                color=_sentinel(curve.index),
                linestyle=dashes(curve.index),
                linewidth=1.8,
                marker="o" if len(curve.x) < 20 else "",
                markersize=3.5,
            )
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.ticklabel_format(useOffset=False)
        axes.grid(linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        text = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    ends = "; ".join(f"{curve.label} ends at {curve.y[-1]:.4g}" for curve in curves)
    return _inline(text.getvalue(), f"{title} over the epochs: {ends}")


def dashes(index: int) -> str:
    """The line style of a run: that of one color changes, and neighbours have different ones."""
    return DASHES[(index + index // COLORS) % len(DASHES)]


def _sentinel(index: int) -> str:
    return f"#0708{index % COLORS:02x}"


def _inline(svg: str, label: str) -> str:
    """The SVG element alone, in the page's colors and font."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\s*<style.*?</style>", "", svg, flags=re.DOTALL)  # it would style the page
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # charts would share these ids
    svg = re.sub(r"font-family: [^;]*;", "", svg)
    svg = svg.replace(_INK, "currentColor").replace(_GRID, "var(--line)")
    for index in range(COLORS):
        svg = svg.replace(_sentinel(index), f"var(--c{index})")
    # `label` comes last: it may hold what the lines above replace
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
