"""The table of `bench_training_gpu`: whole training steps on a GPU."""

from typing import Any

from experiments.measuring.row_names import TORCH
from experiments.reporting import markdown
from experiments.reporting.reports.totals import failures

Rows = dict[tuple[str, int, float, str, str], dict[str, Any]]


def table(report: dict[str, Any]) -> str:
    """Returns a row for each network, batch and sparsity, and a column for each execution.

    Args:
      report: of `experiments.bench.gpu.training`.

    Returns:
      Markdown.
    """
    keys = ("model", "batch_size", "sparsity", "execution", "implementation")
    rows: Rows = {tuple(row[key] for key in keys): row for row in report["rows"]}
    kinds = dict.fromkeys(key[3:] for key in rows if key[2])
    with_torch = any(key[3] == TORCH for key in rows)
    dense_kinds = dict.fromkeys(key[3:] for key in rows if key[4] and not key[2])
    lines = []
    for model, batch, sparsity in dict.fromkeys(key[:3] for key in rows if key[2]):
        dense = rows.get((model, batch, 0.0, "dense", ""))
        cells = [model, str(batch), f"{sparsity:.0%}"]
        cells.append(f"{dense['step_ms_median']:.2f}" if dense else "-")
        if with_torch:
            cells.append(_step(rows.get((model, batch, 0.0, TORCH, "")), ""))
        cells += [_step(rows.get((model, batch, 0.0, *kind)), kind[1]) for kind in dense_kinds]
        cells += [_step(rows.get((model, batch, sparsity, *kind)), kind[1]) for kind in kinds]
        lines.append(cells)
    columns = ["network", "batch", "sparsity", "dense NHWC, ms"]
    columns += [f"{TORCH}, ms"] if with_torch else []
    columns += [f"dense in the kernels of {name}, ms" for _, name in dense_kinds]
    columns += [f"{' '.join(kind).strip()}, ms" for kind in kinds]
    text = markdown.table(columns, lines, text_columns=3)
    failed = failures(report)
    return f"{text}\n{failed}" if failed else text


def _step(row: dict[str, Any] | None, implementation: str) -> str:
    """The time of a step, its speed-up, and how many layers another implementation served."""
    if row is None:
        return "-"
    text = f"{row['step_ms_median']:.2f}"
    if row["speed_up_over_dense"]:
        text += f" ({row['speed_up_over_dense']:.2f}x)"
    others = [
        f"{count} {name}" for name, count in row.get("layers", {}).items() if name != implementation
    ]
    return text + (f"; layers: {', '.join(others)}" if others else "")
