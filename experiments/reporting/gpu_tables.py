"""The README's tables of the GPU reports, in microseconds and milliseconds."""

from typing import Any

from experiments.reporting.tables import markdown

MODES = ("forward", "forward + gradients")
PASSES = ("forward", "input gradient", "weight gradient")


def kernels(report: dict[str, Any]) -> str:
    """bench_kernels_gpu: ceilings, what all shapes come to, then the layers at the sparsity nearest
    to 90%.

    Args:
      report: of bench_gpu.

    Returns:
      Lines of markdown.
    """
    parts = []
    if report["ceilings"]:
        lines = [
            [c["name"], f"{c['rate']:g} {c['unit']}" if c["rate"] else "-", c["what"]]
            for c in report["ceilings"]
        ]
        parts.append(markdown(["measured ceiling", "rate", "of what"], lines, left=3))
    lines = []
    for line in report["summary"]:
        ends = [f"{line[end]['speed_up']:.2f}x ({line[end]['layer']})" for end in ("worst", "best")]
        cells = [
            f"{line['sparsity']:.0%}",
            line["mode"],
            f"**{line['geometric_mean']:.2f}x**",
            *ends,
        ]
        lines.append([*cells, f"{len(line['slower'])} of {line['shapes']}"])
    columns = [
        "sparsity",
        "pass",
        "against cuDNN, geometric mean",
        "worst layer",
        "best layer",
        "slower than it",
    ]
    parts.append(markdown(columns, lines, left=2))
    shown = min(
        {row["sparsity"] for row in report["rows"]}, key=lambda sparsity: abs(sparsity - 0.9)
    )
    found = {(row["layer"], row["mode"]): row for row in report["rows"] if row["sparsity"] == shown}
    lines = []
    for layer in dict.fromkeys(layer for layer, _ in found):
        cells = [
            layer,
            f"{found[layer, MODES[0]]['density']:.1%}",
            found[layer, MODES[0]]["chosen"],
        ]
        for mode in MODES:
            row = found[layer, mode]
            us = {name: 1e3 * times["median"] for name, times in row["ms"].items()}
            cells += [f"{us[row['best_dense']]:.1f}", f"{us['masked dense']:.1f}"]
            cells.append(f"{us['chosen']:.1f} ({row['speed_up_over_dense']:.2f}x)")
        lines.append(cells)
    columns = [
        f"{mode}: {what}, us" for mode in MODES for what in ("dense", "masked", "block-sparse")
    ]
    parts.append(markdown([f"layer at {shown:.0%}", "density", "runs", *columns], lines, left=1))
    lines = []
    for layer in dict.fromkeys(layer for layer, _ in found):
        cells = [layer]
        for row in (found[layer, mode] for mode in PASSES):
            gain = row["ms"][row["best_dense"]]["median"] / row["ms"][row["best"]]["median"]
            cells.append(f"{row['runs']} ({gain:.2f}x)")
        lines.append(cells)
    parts.append(
        markdown(
            [f"layer at {shown:.0%}: dense or kernel (the fastest kernel against dense)", *PASSES],
            lines,
            left=1,
        )
    )
    note = "" if report["complete"] else "Not all was measured yet.\n"
    failed = "".join(
        f"Failed: {what}: {error.splitlines()[0][:160]}\n"
        for what, error in report["failed"].items()
    )
    return "\n".join(parts) + (f"\n{note}{failed}" if note or failed else "")


def training(report: dict[str, Any]) -> str:
    """bench_training_gpu: a row for each network, batch and sparsity.

    Args:
      report: of gpu_training.

    Returns:
      Lines of markdown.
    """
    found = {
        (r["model"], r["batch_size"], r["sparsity"], r["execution"], r["implementation"]): r
        for r in report["rows"]
    }
    kinds = [("masked", ""), *dict.fromkeys(key[3:] for key in sorted(found) if key[4])]
    lines = []
    for model, batch, sparsity in dict.fromkeys(key[:3] for key in found if key[3] != "dense"):
        dense = found.get((model, batch, 0.0, "dense", ""))
        cells = [
            model,
            str(batch),
            f"{sparsity:.0%}",
            f"{dense['step_ms_median']:.2f}" if dense else "-",
        ]
        for kind in kinds:
            row = found.get((model, batch, sparsity, *kind))
            up = (
                f" ({row['speed_up_over_dense']:.2f}x)"
                if row and row["speed_up_over_dense"]
                else ""
            )
            others = (
                [f"{n} {name}" for name, n in row.get("layers", {}).items() if name != kind[1]]
                if row
                else []
            )
            cells.append(
                f"{row['step_ms_median']:.2f}{up}{'; layers: ' * bool(others)}{', '.join(others)}"
                if row
                else "-"
            )
        lines.append(cells)
    columns = [
        "network",
        "batch",
        "sparsity",
        "dense NHWC, ms",
        *(f"{' '.join(kind).strip()}, ms" for kind in kinds),
    ]
    failed = "".join(
        f"Failed: {what}: {error.splitlines()[0][:160]}\n"
        for what, error in report["failed"].items()
    )
    return markdown(columns, lines, left=3) + (f"\n{failed}" if failed else "")
