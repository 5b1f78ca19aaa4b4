"""What the reports on many layers have in common: their summary, and which sparsity is shown."""

from collections.abc import Iterable
from typing import Any

SHOWN_SPARSITY = 0.9  # the layers are listed at the sparsity nearest to it


def summary_cells(line: dict[str, Any]) -> list[str]:
    """Returns the cells of one line of a summary, as `experiments.bench.summary` makes it.

    Args:
      line: with the geometric mean, the worst and the best layer, and the slower ones.

    Returns:
      Sparsity, pass, geometric mean, worst layer, best layer and number of slower layers.
    """
    worst, best = (
        f"{line[end]['speed_up']:.2f}x ({line[end]['layer']})" for end in ("worst", "best")
    )
    return [
        f"{line['sparsity']:.0%}",
        line["mode"],
        f"**{line['geometric_mean']:.2f}x**",
        worst,
        best,
        f"{len(line['slower'])} of {line['shapes']}",
    ]


def shown_sparsity(rows: Iterable[dict[str, Any]]) -> float:
    """Returns the sparsity at which single layers are listed.

    Args:
      rows: of a report, with "sparsity".

    Returns:
      The one nearest to `SHOWN_SPARSITY`.
    """
    return min({row["sparsity"] for row in rows}, key=lambda value: abs(value - SHOWN_SPARSITY))


def failures(report: dict[str, Any]) -> str:
    """Returns a line for each measurement that failed.

    Args:
      report: of a GPU benchmark, with "failed".

    Returns:
      Lines; empty if nothing failed.
    """
    return "".join(
        f"Failed: {name}: {error.splitlines()[0][:160]}\n"
        for name, error in report["failed"].items()
    )
