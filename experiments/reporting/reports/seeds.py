"""The table of `bench_seeds`: what pays where several seeds are to be trained."""

from typing import Any

from experiments.reporting import markdown


def table(report: dict[str, Any]) -> str:
    """Returns the time of a step of every seed, in turn, side by side and at once.

    Args:
      report: of `experiments.bench.seeds`.

    Returns:
      Markdown.
    """
    lines = [
        [
            f"{row['model']} x {row['width']:g}, {row['method']} ({row['execution']})",
            str(row["batch_size"]),
            str(row["seeds"]),
            f"{row['in_turn_ms']:.1f} (iqr {row['in_turn_ms_iqr']:.1f})",
            *(_beside(row, name) for name in ("side_by_side", "at_once")),
        ]
        for row in report["rows"]
    ]
    columns = ["network", "batch", "seeds", "in turn, ms", "side by side, ms", "at once, ms"]
    return markdown.table(columns, lines)


def _beside(row: dict[str, Any], name: str) -> str:
    """A way's time, and how many times as fast as in turn it is."""
    if row[f"{name}_ms"] is None:
        return "—"
    factor = row["in_turn_ms"] / row[f"{name}_ms"]
    return f"{row[f'{name}_ms']:.1f} (iqr {row[f'{name}_ms_iqr']:.1f}), {factor:.2f}x"
