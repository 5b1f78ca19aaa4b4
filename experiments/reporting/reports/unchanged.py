"""The table of `bench_unchanged_cpu`: a plain Flax network that becomes sparse."""

from typing import Any

from experiments.reporting import markdown


def table(report: dict[str, Any]) -> str:
    """Returns the step time of each execution.

    Args:
      report: of `experiments.bench.unchanged`.

    Returns:
      Markdown.
    """
    lines = [
        [
            row["execution"],
            f"{row['step_ms_median']:.0f} (iqr {row['step_ms_iqr']:.0f})",
            f"{row['speed_up_over_dense']:.2f}x",
            str(row["transposes"]),
        ]
        for row in report["rows"]
    ]
    columns = ["step", "ms", "faster than dense", "transposes and copies of 4-D arrays"]
    return markdown.table(columns, lines)
