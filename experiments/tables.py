"""Writes the README's tables from experiments/results/*.json: `python -m experiments.tables`; `--check` only fails when one is stale.

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`. Its rows and columns come from the file of that name, so that no
number is typed by hand.
"""

import dataclasses
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
MARKED = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class TablesConfig:
    """What is written.

    Attributes:
      check: write nothing, fail when a table is stale.
      readme: file with the marked tables.
      results: folder of the JSON files.
    """

    check: bool = False
    readme: Path = ROOT / "README.md"
    results: Path = RESULTS


def main(config: TablesConfig) -> None:
    """Rewrites the marked tables.

    Args:
      config: which files.

    Raises:
      ValueError: an unknown table, a missing JSON file, or with `check` a stale table.

    Reference: ours.
    """
    text = config.readme.read_text()
    fresh = MARKED.sub(lambda found: found[1] + table(found[2], config.results) + found[3], text)
    if fresh == text:
        return
    if config.check:
        stale = [old[1] for old, new in zip(MARKED.finditer(text), MARKED.finditer(fresh), strict=True) if old[0] != new[0]]
        raise ValueError(f"{config.readme.name}: stale tables: {', '.join(stale)}; run python -m experiments.tables")
    config.readme.write_text(fresh)


def table(name: str, results: Path = RESULTS) -> str:
    """One table as markdown.

    Args:
      name: of the JSON file, without its ending.
      results: its folder.

    Returns:
      Lines of markdown, with the device and the versions below.

    Raises:
      ValueError: no such table or file.

    Reference: ours.
    """
    kind = next((k for k in TABLES if name.startswith(k)), None)
    path = results / f"{name}.json"
    if kind is None or not path.exists():
        known = ", ".join(sorted(p.stem for p in results.glob("*.json"))) or "none"
        raise ValueError(
            f"table: expected the name of a file in {results.name} that starts with {', '.join(TABLES)}, got {name!r}; there: {known}"
        )
    report = json.loads(path.read_text())
    versions = report["versions"]
    below = f"{report['device']}; Python {versions['python']}, jax {versions['jax']}" + (
        f"; commit {report['commit']}" if report["commit"] else ""
    )
    return f"{TABLES[kind](report)}\n{below}\n"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A markdown table.

    Args:
      columns: headings.
      rows: cells.
      left: the first columns, which are left-aligned; numbers behind them go right.

    Returns:
      Its lines.

    Example:
      >>> print(markdown(["method", "ms"], [["hrbp", "1.5"]]), end="")
      | method | ms |
      |---|---:|
      | hrbp | 1.5 |

    Reference: ours.
    """
    lines = [columns, *rows]
    rule = "|" + "|".join("---" if i < left else "---:" for i in range(len(columns))) + "|"
    text = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join([text[0], rule, *text[1:]]) + "\n"


def _training(report: dict[str, Any]) -> str:
    """bench_training: a row for each network and sparsity, a column for each execution."""
    keys = ("masked", "sparse", "packed")
    found = {(r["model"], r["sparsity"], r["execution"], r["data_format"]): r for r in report["rows"]}
    lines = []
    for model, sparsity in sorted({(m, s) for m, s, execution, _ in found if execution != "dense"}):
        dense = {f: found[model, 0.0, "dense", f]["step_ms_median"] for f in ("NHWC", "CHWN")}
        cells = [f"{dense['NHWC']:.0f} / {dense['CHWN']:.0f}"]
        for key in keys:
            row = found[model, sparsity, key, "NHWC" if key == "masked" else "CHWN"]
            cells.append(f"{row['step_ms_median']:.0f} ({row['speed_up_over_dense']:.2f}x)")
        lines.append([model, f"{sparsity:.0%}", *cells])
    return markdown(["network", "sparsity", "dense NHWC / CHWN, ms", *(f"{key}, ms" for key in keys)], lines, left=2)


def _compare(report: dict[str, Any]) -> str:
    """compare: the main job's table."""

    def ms(value: float | None) -> str:
        return "—" if value is None else f"{value:.1f}"

    lines = []
    for row in report["rows"]:
        accuracy, kept = f"{row['test_accuracy']:.2%}", f"{row['kept_flops_fraction']:.1%}"
        masked = None if row["method"] == "dense" else row["masked_step_ms_median"]
        times = [ms(masked), ms(row["packed_step_ms_median"]), ms(report["dense_step_ms_median"])]
        lines.append([row["method"], accuracy, f"{row['density']:.4f}", kept, *times])
    return markdown(["method", "test accuracy", "density", "kept FLOPs", "masked step, ms", "packed step, ms", "dense step, ms"], lines)


def _kernels(report: dict[str, Any]) -> str:
    """bench_kernels: a row for each layer and sparsity, forward and forward + gradients; geometric means below."""
    modes = ("forward", "forward + gradients")
    found = {(r["layer"], r["sparsity"], r["mode"]): r for r in report["rows"]}
    lines = []
    for layer, sparsity in dict.fromkeys((layer, sparsity) for layer, sparsity, _ in found):
        cells = [layer, f"{sparsity:.0%}"]
        for mode in modes:
            row = found[layer, sparsity, mode]
            ms = {name: times["median"] for name, times in row["ms"].items()}
            cells += [f"{ms['dense NHWC']:.1f} / {ms['dense CHWN']:.1f}", f"{ms['masked dense']:.1f}"]
            cells.append(f"{ms['chosen']:.1f} ({row['speed_up_over_dense']:.2f}x)")
        lines.append(cells)
    for sparsity in dict.fromkeys(row["sparsity"] for row in report["rows"]):
        cells = ["**geometric mean**", f"{sparsity:.0%}"]
        for mode in modes:
            ups = [r["speed_up_over_dense"] for r in report["rows"] if (r["sparsity"], r["mode"]) == (sparsity, mode)]
            cells += ["", "", f"**{statistics.geometric_mean(ups):.2f}x**"]
        lines.append(cells)
    columns = ("dense NHWC / CHWN, ms", "masked, ms", "block-sparse, ms")
    heads = [f"{mode}: {column}" for mode in modes for column in columns]
    regrets = sorted(row["regret"] for row in report["rows"])
    note = (
        f"The picked formulation against the fastest of the same run: median {statistics.median(regrets):+.0%}, worst {regrets[-1]:+.0%}.\n"
    )
    return markdown(["layer", "sparsity", *heads], lines, left=2) + "\n" + note


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"bench_kernels": _kernels, "bench_training": _training, "compare": _compare}


if __name__ == "__main__":
    try:
        main(tyro.cli(TablesConfig, prog="python -m experiments.tables"))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
