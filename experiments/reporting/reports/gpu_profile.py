"""The table of `bench_profile_gpu`: where the time of a training step goes on a GPU."""

from typing import Any

from experiments.measuring.kernel_names import by_category
from experiments.reporting import markdown
from experiments.reporting.reports.totals import failures


def table(report: dict[str, Any]) -> str:
    """Returns a column for each step, and a row for each category of kernels.

    The first rows are the time of a step on the clock, the sum of its kernels' times, and their
    number; "busy" below "step" means that the GPU waited.

    Args:
      report: of `experiments.bench.gpu.profile`.

    Returns:
      Markdown.
    """
    rows = report["rows"]
    sums = [by_category(row["kernels"]) for row in rows]
    lines = [
        ["step, ms", *(f"{row['step_ms']:.2f}" for row in rows)],
        ["busy, ms", *(f"{row['busy_ms']:.2f}" for row in rows)],
        ["kernels", *(f"{sum(n for n, _ in row['kernels'].values()):.0f}" for row in rows)],
    ]
    total_us: dict[str, float] = {}
    for categories in sums:
        for name, (_, us) in categories.items():
            total_us[name] = total_us.get(name, 0.0) + us
    for name in sorted(total_us, key=lambda name: -total_us[name]):
        cells = [categories.get(name) for categories in sums]
        lines.append([f"{name}, ms", *(_cell(cell) for cell in cells)])
    text = markdown.table(["", *map(_heading, rows)], lines, text_columns=1)
    failed = failures(report)
    return f"{text}\n{failed}" if failed else text


def _cell(category: tuple[float, float] | None) -> str:
    if category is None:
        return "-"
    launches, us = category
    return f"{us / 1e3:.2f} ({launches:.0f})"


def _heading(row: dict[str, Any]) -> str:
    text = f"{row['model']} n{row['batch_size']} {row['execution']}"
    return f"{text} {row['implementation']} {row['sparsity']:.0%}" if row["sparsity"] else text
