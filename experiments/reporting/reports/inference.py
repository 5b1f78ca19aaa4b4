"""The table of `bench_inference_cpu`: whole networks at inference."""

from typing import Any

from experiments.reporting import markdown

BASELINES = {"XLA": "speed_up_over_xla", "PyTorch": "speed_up_over_pytorch"}


def table(report: dict[str, Any]) -> str:
    """Returns a row for each network and pattern, the dense ones first.

    Args:
      report: of `experiments.bench.inference`.

    Returns:
      Markdown, with a column for each batch and thread count.
    """
    places = list(dict.fromkeys((row["batch"], row["threads"]) for row in report["rows"]))
    lines = []
    for model in dict.fromkeys(row["model"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["model"] == model]
        for baseline in BASELINES:
            dense = [row for row in rows if row["execution"].startswith(baseline)]
            lines += _line(model, f"dense, {baseline}", dense, places)
        patterns = {(row["flops"], row["pattern"]) for row in rows if row["flops"]}
        for flops, pattern in sorted(patterns, reverse=True):
            packed = [row for row in rows if (row["flops"], row["pattern"]) == (flops, pattern)]
            lines += _line(model, f"SUBP {pattern}", packed, places)
    columns = ["network", "weights", "GFLOPs", "MB"]
    for batch, threads in places:
        columns.append(f"batch {batch}, {threads} thread{'s' if threads > 1 else ''}, ms")
    measured = [name for name, key in BASELINES.items() if key in report["rows"][0]]
    note = (
        f"In brackets: times faster than the fastest dense {' and '.join(measured)}. "
        "GFLOPs are multiply-adds per image, as the papers count them.\n"
    )
    return markdown.table(columns, lines, text_columns=2) + "\n" + note


def _line(
    model: str, weights: str, rows: list[dict[str, Any]], places: list[tuple[int, int]]
) -> list[list[str]]:
    """One line of the table, the fastest row at each place; none if nothing was measured."""
    if not rows:
        return []
    cells = [model, weights, f"{rows[0]['gflops']:.2f}", f"{rows[0]['weights_mb']:.0f}"]
    for place in places:
        here = [row for row in rows if (row["batch"], row["threads"]) == place]
        fastest = min(here, key=lambda row: row["ms_median"])
        cell = f"{fastest['ms_median']:.1f}"
        if fastest["flops"]:
            ups = [f"{fastest[key]:.2f}x" for key in BASELINES.values() if key in fastest]
            cell += f" ({', '.join(ups)})"
        cells.append(cell)
    return [cells]
