"""The tables of `bench_kernels_gpu`: the device's limits, and speed of single convolutions."""

from typing import Any

from experiments.measuring.row_names import CHOSEN, MASKED, PASS_NAMES, TOGETHER
from experiments.reporting import markdown
from experiments.reporting.reports.totals import failures, shown_sparsity, summary_cells

MODES = ("forward", TOGETHER)


def table(report: dict[str, Any]) -> str:
    """Returns the ceilings, the summary over all layers, and the layers at about 90% sparsity.

    Args:
      report: of `experiments.bench.gpu.kernels`.

    Returns:
      Markdown.
    """
    sparsity = shown_sparsity(report["rows"])
    rows = {
        (row["layer"], row["mode"]): row for row in report["rows"] if row["sparsity"] == sparsity
    }
    layers = list(dict.fromkeys(layer for layer, _ in rows))
    heading = f"layer at {sparsity:.0%}"
    parts = [_ceilings(report)] if report["ceilings"] else []
    parts += [_totals(report), _times(heading, layers, rows), _decisions(heading, layers, rows)]
    notes = ("" if report["complete"] else "Not all was measured yet.\n") + failures(report)
    if notes:
        parts.append(notes)
    return "\n".join(parts)


def _ceilings(report: dict[str, Any]) -> str:
    rows = []
    for ceiling in report["ceilings"]:
        rate = f"{ceiling['rate']:g} {ceiling['unit']}" if ceiling["rate"] else "-"
        rows.append([ceiling["name"], rate, ceiling["what"]])
    return markdown.table(["measured ceiling", "rate", "of what"], rows, text_columns=3)


def _totals(report: dict[str, Any]) -> str:
    columns = ["sparsity", "pass", "against cuDNN, geometric mean"]
    columns += ["worst layer", "best layer", "slower layers"]
    return markdown.table(
        columns, [summary_cells(line) for line in report["summary"]], text_columns=2
    )


def _times(heading: str, layers: list[str], rows: dict[tuple[str, str], dict[str, Any]]) -> str:
    times = ("dense", "masked", "block-sparse")
    columns = [f"{mode}: {time}, us" for mode in MODES for time in times]
    lines = []
    for layer in layers:
        first = rows[layer, MODES[0]]
        cells = [layer, f"{first['density']:.1%}", first["chosen"]]
        for row in (rows[layer, mode] for mode in MODES):
            us = {name: 1e3 * times["median"] for name, times in row["ms"].items()}
            cells.append(f"{us[row['best_dense']]:.1f}")
            cells.append(f"{us[MASKED]:.1f}")
            cells.append(f"{us[CHOSEN]:.1f} ({row['speed_up_over_dense']:.2f}x)")
        lines.append(cells)
    return markdown.table([heading, "density", "runs", *columns], lines, text_columns=1)


def _decisions(heading: str, layers: list[str], rows: dict[tuple[str, str], dict[str, Any]]) -> str:
    """Which of dense and the fastest GPU kernel should run each pass, and the kernel's speed-up."""
    lines = []
    for layer in layers:
        cells = [layer]
        for row in (rows[layer, pass_name] for pass_name in PASS_NAMES):
            dense_ms = row["ms"][row["best_dense"]]["median"]
            cells.append(f"{row['runs']} ({dense_ms / row['ms'][row['best']]['median']:.2f}x)")
        lines.append(cells)
    columns = [f"{heading}: dense or kernel (the fastest kernel against dense)", *PASS_NAMES]
    return markdown.table(columns, lines, text_columns=1)
