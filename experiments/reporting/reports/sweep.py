"""The tables of the sweeps: our runs beside the paper's numbers."""

from typing import Any

from experiments.reporting import markdown, results

_EXTRA = {
    "convergence": "epoch of convergence",
    "sad": "SAD an epoch",
    "compression": "compression",
}


def table(report: dict[str, Any]) -> str:
    """Returns a row for each cell, and below what the table is.

    Args:
      report: of `experiments.sweep`.

    Returns:
      Markdown. Accuracies are top-1 in percent, means over seeds and standard deviations.
    """
    rows = report["rows"]
    text = _speed(rows) if rows and "speed_up" in rows[0] else _accuracies(report)
    if "attack" in report["columns"]:
        text += "\n" + _attacks(rows)
    scale = ""
    if report["scale"] != "full":
        scale = f"Scale {report['scale']}: smaller networks, less data, fewer epochs. "
    return f"{text}\n{scale}{_below(report)}"


def section(report: dict[str, Any], name: str) -> str:
    """Returns a table with its heading and its figure.

    Args:
      report: of `experiments.sweep`.
      name: of the report.
    """
    scale = "" if report["scale"] == "full" else f", scale {report['scale']}"
    heading = f"## {report['title']} (`{report['table']}`{scale})"
    return f"{heading}\n\n![{report['title']}](figures/{name}.svg)\n\n{table(report)}"


def names(folder: Any = results.RESULTS) -> list[str]:
    """Returns the names of the sweeps' reports in a folder."""
    return [name for name in results.names(folder) if name.startswith("sweep_")]


def percent(value: float | None, digits: int = 2) -> str:
    """Returns a fraction in percent, without the sign; a dash for None."""
    return "—" if value is None else f"{100 * value:.{digits}f}"


def _accuracies(report: dict[str, Any]) -> str:
    columns = ["network", "data", "sparsity", "method", "accuracy, %", "paper, %"]
    columns += ["to dense", "paper, to dense", "density", "kept FLOPs", "training FLOPs"]
    columns += ["epochs", "training, s", "seeds"]
    columns += [_EXTRA[name] for name in report["columns"] if name in _EXTRA]
    dense = {row["paper_network"]: row for row in report["rows"] if row["row"] == "dense"}
    lines = []
    for row in report["rows"]:
        against = dense.get(row["paper_network"], {})
        mean, std = row["test_accuracy_mean"], row["test_accuracy_std"]
        accuracy = "diverged" if row["failed"] else percent(mean)
        cells = [row["network"], row["data"] or "—"]
        cells += ["—" if row["row"] == "dense" else f"{row['sparsity']:.0%}", row["row"]]
        cells += [accuracy + (f" ± {percent(std)}" if std is not None else "")]
        other = "" if report["scale"] == "full" else f" ({row['paper_network']})"
        cells += ["—" if row["paper"] is None else f"{row['paper']:.2f}{other}"]
        cells += [_gap(mean, against.get("test_accuracy_mean"), 100)]
        cells += [_gap(row["paper"], against.get("paper"), 1)]
        for name in ("density", "kept_flops_fraction", "training_flops_fraction"):
            cells.append(percent(row[name], 1) + ("%" if row[name] is not None else ""))
        seconds = row["train_seconds"]
        cells += [str(row["epochs"]), "—" if seconds is None else f"{seconds:.0f}"]
        cells.append(str(row["seeds"]))
        cells += [
            "—" if row[name] is None else f"{row[name]:.4g}"
            for name in report["columns"]
            if name in _EXTRA
        ]
        lines.append(cells)
    return markdown.table(columns, lines, text_columns=4)


def all_sections(folder: Any = results.RESULTS) -> str:
    """Returns the tables of all sweeps' reports in a folder, one after the other."""
    reports = [(name, results.read(name, folder)) for name in names(folder)]
    return "\n".join(
        f"{section(report, name)}\n{report['device']}; commit {report['commit']}\n"
        for name, report in reports
    )


def _attacks(rows: list[dict[str, Any]]) -> str:
    epsilons = next(([pair[0] for pair in row["attack"]] for row in rows if row["attack"]), [])
    lines = []
    for row in rows:
        name = f"{row['row']}, {row['sparsity']:.0%}"
        clean = percent(row["test_accuracy_mean"])
        lines.append([name, "ours", clean, *(percent(pair[1]) for pair in row["attack"])])
        if row["paper_attacked"]:
            paper = [f"{value:.2f}" for value in row["paper_attacked"]]
            lines.append([name, "paper", "—", *paper])
    columns = ["accuracy, %", "", "clean", *(f"epsilon {epsilon:g}" for epsilon in epsilons)]
    lines = [line + ["—"] * (len(columns) - len(line)) for line in lines]
    return markdown.table(columns, [line[: len(columns)] for line in lines], text_columns=2)


def _speed(rows: list[dict[str, Any]]) -> str:
    columns = [
        "device",
        "network",
        "width",
        "precision",
        "sparsity",
        "speed-up over dense",
        "paper",
    ]
    lines = [
        [
            *(row["device"], row["network"], f"{row['width']:g}", row["precision"]),
            f"{row['sparsity']:.0%}",
            f"{row['speed_up']:.2f}x",
            "—" if row["paper"] is None else f"{row['paper']:.1f}x",
        ]
        for row in rows
    ]
    return markdown.table(columns, lines, text_columns=4)


def _gap(value: float | None, dense: float | None, factor: float) -> str:
    return "—" if value is None or dense is None else f"{factor * (value - dense):+.2f}"


def _below(report: dict[str, Any]) -> str:
    seconds = sum((row.get("train_seconds") or 0) * row.get("seeds", 0) for row in report["rows"])
    took = f"; {seconds / 60:.0f} minutes of training" if seconds else ""
    note = f" {report['note']}" if report["note"] else ""
    return f"Paper: {report['source']}.{note} Command: `{report['command']}`{took}."
