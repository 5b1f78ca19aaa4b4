"""The table of `compare`: the methods of the main job side by side."""

from typing import Any

from experiments.reporting import markdown

COLUMNS = (
    "method",
    "test accuracy",
    "density",
    "kept FLOPs",
    "training FLOPs",
    "masked step, ms",
    "packed step, ms",
    "dense step, ms",
)


def table(report: dict[str, Any]) -> str:
    """Returns a row for each method.

    Args:
      report: of `experiments.compare`.

    Returns:
      Markdown.
    """
    lines = []
    for row in report["rows"]:
        masked_ms = None if row["method"] == "dense" else row["masked_step_ms_median"]
        speed_up = row.get("packed_speed_up_over_dense")
        packed = _ms(row["packed_step_ms_median"]) + (f" ({speed_up:.2f}x)" if speed_up else "")
        cells = [row["method"], f"{row['test_accuracy']:.2%}", f"{row['density']:.4f}"]
        training = row.get("training_flops_fraction")
        cells += [f"{row['kept_flops_fraction']:.1%}", f"{training:.1%}" if training else "—"]
        cells += [_ms(masked_ms), packed]
        lines.append([*cells, _ms(report["dense_step_ms_median"])])
    return markdown.table(COLUMNS, lines)


def _ms(value: float | None) -> str:
    return "—" if value is None else f"{value:.1f}"
