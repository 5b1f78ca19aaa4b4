"""Fills the tables and draws the figures of README.md and docs/ from experiments/results/*.json.

A table stands between `<!-- table:NAME -->` and `<!-- /table -->` in README.md or in docs/*.md.
NAME is a report without ".json", the name of a summary (`SUMMARIES`), or of a table that the code
itself gives (`GENERATED`). Nobody types a number by hand: cells, device, versions and commit come
from the report. The command is `python -m experiments.report`.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.reporting import figures
from experiments.reporting.reports import (
    channel_blocks,
    compare,
    data,
    gpu_kernels,
    gpu_profile,
    gpu_training,
    inference,
    kernels,
    loop,
    methods,
    parts,
    seeds,
    sweep,
    training,
    unchanged,
)
from experiments.reporting.results import RESULTS, ROOT, names, read

MARKED = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)

Table = Callable[[dict[str, Any]], str]
TABLES: dict[str, Table] = {  # by the start of the report's name; the first that fits
    "bench_kernels_gpu": gpu_kernels.table,
    "bench_profile_gpu": gpu_profile.table,
    "bench_training_gpu": gpu_training.table,
    "bench_kernels_cpu_batch": kernels.totals,
    "bench_kernels": kernels.table,
    "bench_data": data.table,
    "bench_loop": loop.table,
    "bench_parts": parts.table,
    "bench_seeds": seeds.table,
    "bench_training": training.table,
    "bench_inference": inference.table,
    "bench_unchanged": unchanged.table,
    "channel_blocks": channel_blocks.table,
    "compare": compare.table,
    "sweep": sweep.table,
}
SUMMARIES: dict[str, tuple[str, Table]] = {  # name -> the report's name, and the table
    "training_summary": ("bench_training_cpu", training.summary),
}
GENERATED: dict[str, Callable[[], str]] = {"methods": methods.table}  # from the code, no report
ALL_OF_A_KIND = {"sweeps": sweep.all_sections}  # folder of the reports -> all that there are


@dataclasses.dataclass(frozen=True)
class TablesConfig:
    """Which files are filled.

    Attributes:
      check: write nothing; fail when a table or a figure is stale.
      root: folder of README.md and docs/.
      results: folder of the JSON reports.
    """

    check: bool = False
    root: Path = ROOT
    results: Path = RESULTS


def main(config: TablesConfig) -> None:
    """Rewrites the marked tables and the figures, or checks them.

    Args:
      config: which files.

    Raises:
      ValueError: an unknown table, a missing report, or with `check` something stale.
    """
    stale = []
    for page in (config.root / "README.md", *sorted((config.root / "docs").glob("*.md"))):
        if page.exists():
            stale += [f"{page.name}: {name}" for name in _fill(page, config)]
    for name, figure in figures.of(config.results).items():
        if figure.report is None or (config.results / f"{figure.report}.json").exists():
            path = config.root / "docs" / "figures" / f"{name}.svg"
            svg = figure.draw(figure.report and read(figure.report, config.results))
            if not path.exists() or path.read_text() != svg:
                stale.append(path.name)
                if not config.check:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(svg)
    if config.check and stale:
        raise ValueError(
            f"stale tables or figures: {', '.join(stale)}; run python -m experiments.report"
        )


def _fill(page: Path, config: TablesConfig) -> list[str]:
    """Fills the tables of a page, unless it is only checked; returns the names of stale ones."""
    old = page.read_text()
    new = MARKED.sub(lambda mark: mark[1] + table(mark[2], config.results) + mark[3], old)
    if new != old and not config.check:
        page.write_text(new)
    pairs = zip(MARKED.finditer(old), MARKED.finditer(new), strict=True)
    return [before[2] for before, after in pairs if before[0] != after[0]]


def table(name: str, results: Path = RESULTS) -> str:
    """Makes one table.

    Args:
      name: of a report, without its ending, of a summary, or of a generated table.
      results: folder of the reports.

    Returns:
      Markdown; below that of a report the device, the versions and the commit.

    Raises:
      ValueError: there is no such table or report.
    """
    if name in GENERATED:
        return GENERATED[name]()
    if name in ALL_OF_A_KIND:
        return ALL_OF_A_KIND[name](results)
    report_name, make = SUMMARIES.get(name, (name, None))
    make = make or next((TABLES[start] for start in TABLES if name.startswith(start)), None)
    if make is None:
        raise ValueError(
            f"table: expected the name of a file in {results.name} that starts with "
            f"{', '.join(TABLES)}, or one of "
            f"{', '.join([*SUMMARIES, *GENERATED, *ALL_OF_A_KIND])}; got {name!r}; "
            f"there: {', '.join(names(results)) or 'none'}"
        )
    report = read(report_name, results)
    return f"{make(report)}\n{_origin(report)}\n"


def _origin(report: dict[str, Any]) -> str:
    versions = report["versions"]
    text = f"{report['device']}; Python {versions['python']}, jax {versions['jax']}"
    if "torch" in versions:
        text += f", PyTorch {versions['torch']}"
    return text + (f"; commit {report['commit']}" if report["commit"] else "")
