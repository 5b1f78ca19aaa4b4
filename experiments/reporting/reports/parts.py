"""The tables of `bench_parts_cpu`: what is around the convolutions, and the grouping."""

import statistics
from typing import Any

from experiments.reporting import markdown

MODES = ("forward", "forward + gradient")


def table(report: dict[str, Any]) -> str:
    """Returns NHWC against CHWN for each operation over all sizes, then the grouping's times.

    Args:
      report: of `experiments.bench.parts`.

    Returns:
      Markdown.
    """
    lines = []
    for operation in dict.fromkeys(row["operation"] for row in report["rows"]):
        cells = [operation]
        for mode in MODES:
            ratios = [
                row["nhwc_over_chwn"]
                for row in report["rows"]
                if (row["operation"], row["mode"]) == (operation, mode)
            ]
            mean = statistics.geometric_mean(ratios)
            cells.append(f"{mean:.2f}x ({min(ratios):.2f}-{max(ratios):.2f})")
        lines.append(cells)
    text = markdown.table(["NHWC time over CHWN time", *MODES], lines)
    if not report["grouping"]:
        return text
    seconds = ("second_s", "second_cpu_s", "first_s")
    lines = [[row["what"], *(f"{row[name]:.2f}" for name in seconds)] for row in report["grouping"]]
    columns = ["grouping", "seconds", "processor seconds", "seconds with compilation"]
    return text + "\n" + markdown.table(columns, lines)
