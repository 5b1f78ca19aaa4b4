"""The figure of a sweep: accuracies beside the paper's, curves, attacks or speed-ups."""

import io
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

STYLE: Any = {"font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "blocksparse_jax"}


def draw(report: dict[str, Any]) -> str:
    """Draws a report.

    Args:
      report: of `experiments.sweep`.

    Returns:
      The text of an SVG file; the same for the same report.
    """
    rows = report["rows"]
    if report["scale"] != "full":  # the paper's numbers are of other networks, on other data
        rows = [row | {"paper": None} for row in rows]
    with matplotlib.rc_context(STYLE):
        if rows and "speed_up" in rows[0]:
            figure = _panels([_device_and_network(row) for row in rows], rows, _speed_ups, 3.4)
        elif report["curves"]:
            figure = _panels(["test_accuracy", "sad"], None, _curves(rows), 4.6)
        elif "attack" in report["columns"]:
            figure = _panels(["accuracy"], None, _attacks(rows), 3.4)
        else:
            lines = len({row["row"] for row in rows})
            names = [row["network"] for row in rows]
            figure = _panels(names, rows, _accuracies, 1.2 + 0.28 * max(lines, 4))
        FigureCanvasSVG(figure)
        text = io.StringIO()
        metadata = {"Date": None, "Creator": None}
        figure.savefig(text, format="svg", metadata=metadata, bbox_inches="tight")
    return text.getvalue()


def _panels(names: list[str], rows: Any, plot: Any, height: float) -> Figure:
    """One panel for each name; `plot(axes, name, the name's rows)`."""
    panels = list(dict.fromkeys(names))
    figure = Figure(figsize=(5 * len(panels), height), facecolor="white")
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        of_panel = (
            [row for row, own in zip(rows, names, strict=True) if own == name] if rows else []
        )
        plot(axes, name, of_panel)
        axes.set_title(name.replace("_", " "), fontsize=11)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.subplots_adjust(wspace=0.45)
    return figure


def _accuracies(axes: Axes, name: str, rows: list[dict[str, Any]]) -> None:
    """Our means and deviations as dots, the paper's numbers as circles; a color a sparsity."""
    labels = list(dict.fromkeys(row["row"] for row in rows))
    sparsities = list(dict.fromkeys(row["sparsity"] for row in rows))
    for row in rows:
        place, color = labels.index(row["row"]), f"C{sparsities.index(row['sparsity'])}"
        if row["test_accuracy_mean"] is not None:
            mean, std = row["test_accuracy_mean"], row["test_accuracy_std"] or 0.0
            axes.errorbar(100 * mean, place, xerr=100 * std, fmt="o", color=color)
        if row["paper"] is not None:
            axes.plot(row["paper"], place, "o", color=color, fillstyle="none")
    for i, sparsity in enumerate(sparsities):
        axes.plot([], [], "o", color=f"C{i}", label=f"{sparsity:.0%}")
    if any(row["paper"] is not None for row in rows):
        axes.plot([], [], "o", color="gray", fillstyle="none", label="paper")
    axes.legend(fontsize=8)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("top-1, %")


def _curves(rows: list[dict[str, Any]]) -> Any:
    def plot(axes: Axes, name: str, _: Any) -> None:
        for row in rows:
            values = row["curves"][name]
            axes.plot(range(1, len(values) + 1), values, marker=".", label=row["row"])
        axes.set_xlabel("epoch")
        if name == "sad":
            axes.legend(fontsize=7)

    return plot


def _attacks(rows: list[dict[str, Any]]) -> Any:
    def plot(axes: Axes, name: str, _: Any) -> None:
        for i, row in enumerate(rows):
            if row["attack"]:
                points = [[0.0, row["test_accuracy_mean"]], *row["attack"]]
                label = f"{row['row']}, {row['sparsity']:.0%}"
                axes.plot(*zip(*points, strict=True), marker="o", color=f"C{i}", label=label)
        axes.set_xlabel("epsilon")
        axes.legend(fontsize=8)

    return plot


def _device_and_network(row: dict[str, Any]) -> str:
    return f"{row['network']}, {row['device']}"


def _speed_ups(axes: Axes, name: str, rows: list[dict[str, Any]]) -> None:
    for key, style, label in (("speed_up", "o-", "ours"), ("paper", "o", "paper")):
        points = [(100 * row["sparsity"], row[key]) for row in rows if row[key] is not None]
        if points:
            fill = "none" if key == "paper" else "full"
            axes.plot(*zip(*sorted(points), strict=True), style, fillstyle=fill, label=label)
    axes.set_xlabel("sparsity, %")
    axes.set_ylabel("training step, times faster than dense")
    axes.legend(fontsize=8)
