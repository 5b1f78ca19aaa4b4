"""The tables of `bench_parts_cpu`: what is around the convolutions, and the grouping."""

import statistics
from typing import Any

from experiments.reporting import markdown

MODES = ("forward", "forward + gradient")


def table(report: dict[str, Any]) -> str:
    """Returns NHWC against CHWN and flax against `norm_act` over all sizes, then the grouping.

    Args:
      report: of `experiments.bench.parts`.

    Returns:
      Markdown.
    """
    text = _ratios(report["rows"], "NHWC time over CHWN time", "nhwc_over_chwn")
    fused = [row for row in report["rows"] if "chwn_over_norm_act" in row]
    if fused:
        text += "\n" + _ratios(fused, "flax time over norm_act time, CHWN", "chwn_over_norm_act")
    if not report["grouping"]:
        return text
    columns = {
        "second_s": "seconds",
        "second_cpu_s": "processor seconds",
        "first_s": "seconds with compilation",
        "first_cpu_s": "processor seconds with compilation",
    }
    names = [name for name in columns if all(name in row for row in report["grouping"])]
    lines = [[row["what"], *(f"{row[name]:.2f}" for name in names)] for row in report["grouping"]]
    return text + "\n" + markdown.table(["grouping", *(columns[name] for name in names)], lines)


def _ratios(rows: list[dict[str, Any]], title: str, name: str) -> str:
    """The mean and the range of a ratio over all sizes, for each operation and mode."""
    lines = []
    for operation in dict.fromkeys(row["operation"] for row in rows):
        cells = [operation]
        for mode in MODES:
            ratios = [
                row[name] for row in rows if (row["operation"], row["mode"]) == (operation, mode)
            ]
            mean = statistics.geometric_mean(ratios)
            cells.append(f"{mean:.2f}x ({min(ratios):.2f}-{max(ratios):.2f})")
        lines.append(cells)
    return markdown.table([title, *MODES], lines)
