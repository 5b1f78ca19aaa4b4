"""What the runs of a table have brought, as the report that its Markdown and its figure show."""

import statistics
from typing import Any

from experiments.measuring.environment import device, origin
from experiments.sweeps.folder import SweepFolder
from experiments.sweeps.jobs import Job
from experiments.sweeps.table import SweepTable
from experiments.training.config import flat
from experiments.training.run_folder import RunFolder

_MEANS = ("density", "kept_flops_fraction", "training_flops_fraction", "train_seconds")
_CONVERGED = 0.01  # of the last test accuracy


def report(
    name: str, table: SweepTable, folder: SweepFolder, jobs: list[Job], scale: str, command: str
) -> dict[str, Any]:
    """The report of a table.

    Args:
      name: of the table.
      table: at the full scale.
      folder: of the sweeps.
      jobs: of the table.
      scale: of the runs.
      command: that makes it.

    Returns:
      JSON values: a row for each cell, with the means over its seeds; None where none has ended.
    """
    by_cell: dict[str, list[Job]] = {}
    for job in jobs:
        by_cell.setdefault(job.name.rpartition("/")[0], []).append(job)
    rows = [_row(table, folder, of_cell) for of_cell in by_cell.values()]
    devices = sorted({device for row in rows for device in row.pop("devices")})
    commits = sorted({commit for row in rows for commit in row.pop("commits")})
    if table.measured is not None:
        rows = table.measured()
        devices = sorted({row["device"] for row in rows})
        commits = sorted({row.pop("commit") for row in rows})
    return (
        {
            "table": name,
            "title": table.title,
            "source": table.source,
            "note": table.note,
            "scale": scale,
            "columns": list(table.columns),
            "curves": table.curves,
            "command": command,
            "rows": rows,
        }
        | origin()
        | {"device": "; ".join(devices) or device()}
        | ({"commit": ", ".join(commits)} if commits else {})
    )


def _row(table: SweepTable, folder: SweepFolder, jobs: list[Job]) -> dict[str, Any]:
    cell = jobs[0].cell
    ended = [(job, folder.finished(job.path, bool(cell.epsilons))) for job in jobs]
    done = [(job, result) for job, result in ended if result and "failed" not in result]
    results = [result for _, result in done]
    failed = [result["failed"] for _, result in ended if result and "failed" in result]
    row: dict[str, Any] = {
        "name": jobs[0].name.rpartition("/")[0],
        "row": cell.row,
        "network": cell.network,
        "data": results[0]["data"] if results else None,
        "config": {
            key: value
            for key, value in flat(cell.config).items()
            if key not in ("out", "data_dir", "seed", "log_every") and value is not None
        },
        "sparsity": cell.config.sparsity,
        "epochs": cell.config.epochs,
        "paper": cell.paper,
        "paper_network": jobs[0].network,
        "seeds": len(done),
        "failed": failed,
        "devices": [result["device"] for result in results],
        "commits": [result["commit"] for result in results if result["commit"]],
        **_mean_and_std("test_accuracy", [result["test_accuracy"] for result in results]),
        **{name: _mean([result[name] for result in results]) for name in _MEANS},
    }
    epochs = [
        [line for line in RunFolder(job.path).metrics() if line["kind"] == "epoch"]
        for job, _ in done
    ]
    if "convergence" in table.columns:
        row["convergence"] = _mean([_convergence(lines) for lines in epochs])
    if "sad" in table.columns:
        row["sad"] = _mean([statistics.fmean(line["sad"] for line in lines) for lines in epochs])
    if "compression" in table.columns:
        row["compression"] = _mean([result.get("compression_rate", 1.0) for result in results])
    if "attack" in table.columns:
        row["attack"] = _attacked(results)
        row["paper_attacked"] = list(cell.paper_attacked)
    if table.curves:
        row["curves"] = {
            name: [_mean([line[name] for line in lines]) for lines in zip(*epochs, strict=True)]
            for name in ("test_accuracy", "sad")
        }
    return row


def _attacked(results: list[dict[str, Any]]) -> list[list[float]]:
    """Pairs of epsilon and the mean accuracy."""
    attacks = [[row["accuracy"] for row in result["attack"]] for result in results]
    epsilons = [row["epsilon"] for result in results[:1] for row in result["attack"]]
    means = [statistics.fmean(column) for column in zip(*attacks, strict=True)]
    return [list(pair) for pair in zip(epsilons, means, strict=True)]


def _convergence(lines: list[dict[str, Any]]) -> int:
    """The first epoch, from 1, that is as good as the last one but for `_CONVERGED`."""
    last = lines[-1]["test_accuracy"]
    return next(i for i, line in enumerate(lines, 1) if line["test_accuracy"] >= last - _CONVERGED)


def _mean_and_std(name: str, values: list[float]) -> dict[str, float | None]:
    std = statistics.stdev(values) if len(values) > 1 else None
    return {f"{name}_mean": _mean(values), f"{name}_std": std}


def _mean(values: list[Any]) -> float | None:
    return statistics.fmean(values) if values else None
