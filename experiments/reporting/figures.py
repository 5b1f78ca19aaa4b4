"""Figures of the README and of docs/, drawn from the reports.

A figure is the same text, byte for byte, for the same report: `experiments.report --check` compares
it. Its background is white, so that it can be read on a dark page as well.
"""

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from experiments.measuring.row_names import TORCH
from experiments.reporting import decision_figure, results, sweep_figure
from experiments.reporting.reports import sweep, training

XLA_COLOR, TORCH_COLOR, PACKED_COLOR = "#5b6770", "#d1702a", "#1a6fb5"
STYLE: Any = {
    "font.size": 10,
    "svg.fonttype": "none",  # text stays text: small, and sharp at any size
    "svg.hashsalt": "blocksparse_jax",  # otherwise the ids in the file are random
}


@dataclasses.dataclass(frozen=True)
class ReportFigure:
    """A figure that is drawn from a report, or from the code alone.

    Attributes:
      report: the report's name, without its ending; None where there is none.
      draw: report -> the text of an SVG file.
    """

    report: str | None
    draw: Callable[[Any], str]


def training_step(report: dict[str, Any]) -> str:
    """Draws the time of a training step against the sparsity, one panel for each network.

    The packed step is a line with markers; the dense steps in XLA and in PyTorch, which do not
    depend on the sparsity, are horizontal lines.

    Args:
      report: of `experiments.bench.training`.

    Returns:
      The text of an SVG file.
    """
    rows = report["rows"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2 * len(models), 3.4), facecolor="white")
        FigureCanvasSVG(figure)
        panels = figure.subplots(1, len(models), squeeze=False)[0]
        for axes, model in zip(panels, models, strict=True):
            _step_times(axes, rows, model)
        panels[0].set_ylabel("training step, ms")
        figure.subplots_adjust(left=0.08, right=0.98, bottom=0.15, top=0.9, wspace=0.18)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _step_times(axes: Axes, rows: list[dict[str, Any]], model: str) -> None:
    packed = sorted(
        (100 * row["sparsity"], row["step_ms_median"])
        for row in training.steps(rows, model, "packed")
    )
    sparsities, packed_ms = zip(*packed, strict=True)
    axes.plot(sparsities, packed_ms, marker="o", color=PACKED_COLOR)
    for i, (sparsity, ms) in enumerate(packed):
        axes.annotate(
            f"{'' if i else 'block-sparse: '}{ms:.0f}",
            (sparsity, ms),
            xytext=(0 if i else -4, 8),
            textcoords="offset points",
            ha="center" if i else "left",
            color=PACKED_COLOR,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    highest = max(packed_ms)
    for name, execution, color in (
        ("dense, XLA", "dense", XLA_COLOR),
        ("dense, PyTorch", TORCH, TORCH_COLOR),
    ):
        dense_ms = training.fastest(rows, model, execution)
        if dense_ms is not None:
            highest = max(highest, dense_ms)
            axes.axhline(dense_ms, color=color, linestyle="--", linewidth=1.3)
            axes.annotate(
                f"{name}: {dense_ms:.0f}",
                (1, dense_ms),
                xycoords=("axes fraction", "data"),
                xytext=(-4, 4),
                textcoords="offset points",
                ha="right",
                color=color,
            )
    axes.set_title(training.network(rows, model), fontsize=11)
    axes.set_xlabel("sparsity, %")
    axes.set_xticks(sparsities)
    axes.set_xlim(sparsities[0] - 3, 98)
    axes.set_ylim(0, 1.15 * highest)
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


FIGURES = {
    "choosing_a_method": ReportFigure(None, decision_figure.draw),
    "training_step": ReportFigure("bench_training_cpu", training_step),
}


def of(folder: Path = results.RESULTS) -> dict[str, ReportFigure]:
    """All figures: those of `FIGURES`, and one for each report of a sweep in a folder."""
    sweeps = {name: ReportFigure(name, sweep_figure.draw) for name in sweep.names(folder)}
    return FIGURES | sweeps
