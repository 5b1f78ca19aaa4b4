"""The table of `bench_data`: images per second of a core on ImageNet's path."""

from typing import Any

from experiments.reporting import markdown


def table(report: dict[str, Any]) -> str:
    """Returns the speed of each part of the path, beside decoding alone.

    Args:
      report: of `experiments.bench.data`.

    Returns:
      Markdown.
    """
    lines = [
        [
            row["what"],
            str(row["cores"]),
            f"{row['images_per_second_and_core']:.0f} (iqr {row['iqr']:.0f})",
            f"{row['of_the_floor']:.0%}",
        ]
        for row in report["rows"]
    ]
    columns = [
        f"{report['image']} images, {report['kilobytes']:.0f} KB each",
        "cores",
        "images/s of a core",
        "of decoding alone",
    ]
    return markdown.table(columns, lines)
