"""The tables of `bench_training_cpu`: whole training steps on a CPU."""

from typing import Any

from experiments.measuring.row_names import TORCH
from experiments.reporting import markdown

EXECUTIONS = ("masked", "sparse", "packed")
NAMES = {"vgg19": "VGG-19", "resnet20": "ResNet-20", "resnet32": "ResNet-32"}
SUMMARY_SPARSITIES = (0.9, 0.95)


def table(report: dict[str, Any]) -> str:
    """Returns a row for each network and sparsity, and a column for each execution.

    Args:
      report: of `experiments.bench.training`.

    Returns:
      Markdown. In brackets: times faster than the fastest dense step in XLA.
    """
    rows = report["rows"]
    with_torch = any(row["execution"] == TORCH for row in rows)
    with_native = any(row["execution"] == "native" for row in rows)
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        dense_ms = {
            row["data_format"]: row["step_ms_median"] for row in steps(rows, model, "dense")
        }
        for sparsity in sorted({row["sparsity"] for row in steps(rows, model, "packed")}):
            cells = [network(rows, model), f"{sparsity:.0%}"]
            cells.append(f"{dense_ms['NHWC']:.0f} / {dense_ms['CHWN']:.0f}")
            if with_native:
                cells.append(_ms(fastest(rows, model, "native")))
            if with_torch:
                cells.append(f"{fastest(rows, model, TORCH):.0f}")
            for execution in EXECUTIONS:
                [row] = steps(rows, model, execution, sparsity)
                cells.append(f"{row['step_ms_median']:.0f} ({row['speed_up_over_dense']:.2f}x)")
            lines.append(cells)
    columns = ["network", "sparsity", "dense NHWC / CHWN, ms"]
    columns += ["dense in the native kernels, ms"] if with_native else []
    columns += [f"{TORCH}, ms"] if with_torch else []
    columns += [f"{execution}, ms" for execution in EXECUTIONS]
    return markdown.table(columns, lines, text_columns=2)


def summary(report: dict[str, Any]) -> str:
    """Returns the packed step against both dense ones, for each network at 90 and 95%.

    Args:
      report: of `experiments.bench.training`.

    Returns:
      Markdown; "—" where PyTorch was not measured.
    """
    rows = report["rows"]
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        xla_ms, torch_ms = fastest(rows, model, "dense"), fastest(rows, model, TORCH)
        for sparsity in SUMMARY_SPARSITIES:
            packed_ms = fastest(rows, model, "packed", sparsity)
            cells = [network(rows, model), f"{sparsity:.0%}", _ms(xla_ms), _ms(torch_ms)]
            cells.append(_ms(packed_ms))
            cells += [_ratio(xla_ms, packed_ms), _ratio(torch_ms, packed_ms)]
            lines.append(cells)
    columns = ["network", "sparsity", "dense in XLA, ms", "dense in PyTorch, ms"]
    columns += ["block-sparse, ms", "faster than XLA", "faster than PyTorch"]
    return markdown.table(columns, lines, text_columns=2)


def steps(
    rows: list[dict[str, Any]], model: str, execution: str, sparsity: float | None = None
) -> list[dict[str, Any]]:
    """Returns the rows of a network in one execution.

    Args:
      rows: of the report.
      model: its name in the zoo.
      execution: dense, masked, sparse, packed or `TORCH`.
      sparsity: of the rows; None for all.

    Returns:
      Rows.
    """
    return [
        row
        for row in rows
        if (row["model"], row["execution"]) == (model, execution)
        and sparsity in (None, row["sparsity"])
    ]


def fastest(
    rows: list[dict[str, Any]], model: str, execution: str, sparsity: float | None = None
) -> float | None:
    """Returns the least step time in milliseconds among `steps(...)`; None if there are none."""
    return min(
        (row["step_ms_median"] for row in steps(rows, model, execution, sparsity)), default=None
    )


def network(rows: list[dict[str, Any]], model: str) -> str:
    """Returns a network's name in words, with its width if that is not 1."""
    width = next(row["width"] for row in rows if row["model"] == model)
    name = NAMES.get(model, model)
    return f"{name}, width {width:g}" if model.startswith("resnet") and width != 1 else name


def _ms(value: float | None) -> str:
    return "—" if value is None else f"{value:.0f}"


def _ratio(dense_ms: float | None, packed_ms: float | None) -> str:
    if dense_ms is None or packed_ms is None:
        return "—"
    return f"**{dense_ms / packed_ms:.1f}x**"
