"""The tables of `bench_kernels_cpu`: speed of single convolutions on a CPU."""

import statistics
from typing import Any

from experiments.measuring.row_names import CHOSEN, MASKED
from experiments.reporting import markdown
from experiments.reporting.reports.totals import shown_sparsity, summary_cells

MODES = ("forward", "forward + gradients")


def totals(report: dict[str, Any]) -> str:
    """Returns the summary over all layers, for each dense baseline.

    Args:
      report: of `experiments.bench.kernels`.

    Returns:
      Markdown.
    """
    columns = ["against", "sparsity", "pass", "geometric mean"]
    columns += ["worst layer", "best layer", "slower layers"]
    rows = [[line["against"], *summary_cells(line)] for line in report["summary"]]
    return markdown.table(columns, rows, text_columns=3)


def table(report: dict[str, Any]) -> str:
    """Returns the summary, the layers at about 90% sparsity, and how well the choice is made.

    Args:
      report: of `experiments.bench.kernels`.

    Returns:
      Markdown.
    """
    regrets = sorted(row["regret"] for row in report["rows"])
    note = (
        "The implementation that is picked, against the fastest one measured: median "
        f"{statistics.median(regrets):+.0%}, worst {regrets[-1]:+.0%}.\n"
    )
    return f"{totals(report)}\n{_layers(report)}\n{note}"


def _layers(report: dict[str, Any]) -> str:
    sparsity = shown_sparsity(report["rows"])
    rows = {
        (row["layer"], row["mode"]): row for row in report["rows"] if row["sparsity"] == sparsity
    }
    with_torch = any("speed_up_over_torch" in row for row in rows.values())
    times = ["dense, ms", "PyTorch dense, ms", "masked, ms", "block-sparse, ms"]
    if not with_torch:
        times.remove("PyTorch dense, ms")
    columns = [f"layer at {sparsity:.0%}", *(f"{mode}: {time}" for mode in MODES for time in times)]
    lines = []
    for layer in dict.fromkeys(layer for layer, _ in rows):
        cells = [layer]
        for mode in MODES:
            cells += _times(rows[layer, mode], with_torch)
        lines.append(cells)
    return markdown.table(columns, lines)


def _times(row: dict[str, Any], with_torch: bool) -> list[str]:
    ms = {name: times["median"] for name, times in row["ms"].items()}
    dense = row["best_dense"]
    cells = [f"{ms[dense]:.1f} ({dense.removeprefix('dense ')})"]
    if with_torch:
        cells.append(f"{min(ms[name] for name in ms if name.startswith('PyTorch')):.1f}")
    cells.append(f"{ms[MASKED]:.1f}")
    cells.append(f"{ms[CHOSEN]:.1f} ({row['speed_up_over_dense']:.2f}x)")
    return cells
