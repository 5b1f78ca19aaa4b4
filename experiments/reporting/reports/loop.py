"""The table of `bench_loop`: what a run's loop adds to its bare training step."""

from typing import Any

from experiments.reporting import markdown


def table(report: dict[str, Any]) -> str:
    """Returns the time of a step, the loop's overhead and the speed of the evaluation.

    Args:
      report: of `experiments.bench.loop`.

    Returns:
      Markdown.
    """
    lines = [
        [
            f"{row['model']} x {row['width']:g}, {row['method']} ({row['execution']})",
            str(row["batch_size"]),
            str(row["steps_per_dispatch"]),
            f"{row['bare_step_ms']:.2f}",
            f"{row['loop_step_ms']:.2f}",
            f"{row['overhead_percent']:+.1f}% (iqr {row['overhead_percent_iqr']:.1f})",
            f"{row['test_images_per_second']:,}",
        ]
        for row in report["rows"]
    ]
    columns = [
        "network",
        "batch",
        "steps of a dispatch",
        "bare step, ms",
        "step in the loop, ms",
        "overhead",
        "tested images/s",
    ]
    return markdown.table(columns, lines)
