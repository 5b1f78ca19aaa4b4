"""Writes the README's tables from experiments/results/*.json: `python -m
experiments.reporting.tables`.

`--check` only fails when one is stale.

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`. Its rows and columns come from
the file of that name, so that no number is typed by hand.
"""

import dataclasses
import functools
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

ROOT = Path(__file__).resolve().parents[2]
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
    """
    text = config.readme.read_text()
    fresh = MARKED.sub(lambda found: found[1] + table(found[2], config.results) + found[3], text)
    if fresh == text:
        return
    if config.check:
        stale = [
            old[1]
            for old, new in zip(MARKED.finditer(text), MARKED.finditer(fresh), strict=True)
            if old[0] != new[0]
        ]
        raise ValueError(
            f"{config.readme.name}: stale tables: {', '.join(stale)}; run python -m "
            f"experiments.reporting.tables"
        )
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
    """
    kind = next((k for k in TABLES if name.startswith(k)), None)
    path = results / f"{name}.json"
    if kind is None or not path.exists():
        known = ", ".join(sorted(p.stem for p in results.glob("*.json"))) or "none"
        raise ValueError(
            f"table: expected the name of a file in {results.name} that starts with "
            f"{', '.join(TABLES)}, got {name!r}; there: {known}"
        )
    report = json.loads(path.read_text())
    versions = report["versions"]
    torch = f", PyTorch {versions['torch']}" if "torch" in versions else ""
    commit = f"; commit {report['commit']}" if report["commit"] else ""
    below = f"{report['device']}; Python {versions['python']}, jax {versions['jax']}{torch}{commit}"
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
    """
    lines = [columns, *rows]
    rule = "|" + "|".join("---" if i < left else "---:" for i in range(len(columns))) + "|"
    text = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join([text[0], rule, *text[1:]]) + "\n"


def _training(report: dict[str, Any]) -> str:
    """bench_training: a row for each network and sparsity, a column for each execution."""
    keys = ("masked", "sparse", "packed")
    found = {
        (r["model"], r["sparsity"], r["execution"], r["data_format"]): r for r in report["rows"]
    }
    lines = []
    for model, sparsity in sorted({(m, s) for m, s, execution, _ in found if execution != "dense"}):
        dense = {f: found[model, 0.0, "dense", f]["step_ms_median"] for f in ("NHWC", "CHWN")}
        cells = [f"{dense['NHWC']:.0f} / {dense['CHWN']:.0f}"]
        for key in keys:
            row = found[model, sparsity, key, "NHWC" if key == "masked" else "CHWN"]
            cells.append(f"{row['step_ms_median']:.0f} ({row['speed_up_over_dense']:.2f}x)")
        lines.append([model, f"{sparsity:.0%}", *cells])
    return markdown(
        ["network", "sparsity", "dense NHWC / CHWN, ms", *(f"{key}, ms" for key in keys)],
        lines,
        left=2,
    )


def _compare(report: dict[str, Any]) -> str:
    """compare: the main job's table."""

    def ms(value: float | None) -> str:
        return "—" if value is None else f"{value:.1f}"

    lines = []
    for row in report["rows"]:
        accuracy, kept = f"{row['test_accuracy']:.2%}", f"{row['kept_flops_fraction']:.1%}"
        masked = None if row["method"] == "dense" else row["masked_step_ms_median"]
        faster = f" ({up:.2f}x)" if (up := row.get("packed_speed_up_over_dense")) else ""
        times = [
            ms(masked),
            ms(row["packed_step_ms_median"]) + faster,
            ms(report["dense_step_ms_median"]),
        ]
        lines.append([row["method"], accuracy, f"{row['density']:.4f}", kept, *times])
    return markdown(
        [
            "method",
            "test accuracy",
            "density",
            "kept FLOPs",
            "masked step, ms",
            "packed step, ms",
            "dense step, ms",
        ],
        lines,
    )


def _kernel_totals(report: dict[str, Any]) -> str:
    """bench_kernels: what all shapes come to."""
    lines = []
    for line in report["summary"]:
        ends = [f"{line[end]['speed_up']:.2f}x ({line[end]['layer']})" for end in ("worst", "best")]
        cells = [
            line["against"],
            f"{line['sparsity']:.0%}",
            line["mode"],
            f"**{line['geometric_mean']:.2f}x**",
            *ends,
        ]
        lines.append([*cells, f"{len(line['slower'])} of {line['shapes']}"])
    columns = [
        "against",
        "sparsity",
        "pass",
        "geometric mean",
        "worst layer",
        "best layer",
        "slower than it",
    ]
    return markdown(columns, lines, left=3)


def _kernels(report: dict[str, Any]) -> str:
    """bench_kernels: what all shapes come to, then the layers at the sparsity nearest to 90%."""
    modes = ("forward", "forward + gradients")
    shown = min(
        {row["sparsity"] for row in report["rows"]}, key=lambda sparsity: abs(sparsity - 0.9)
    )
    found = {(r["layer"], r["mode"]): r for r in report["rows"] if r["sparsity"] == shown}
    torch = any("speed_up_over_torch" in row for row in report["rows"])
    lines = []
    for layer in dict.fromkeys(layer for layer, _ in found):
        cells = [layer]
        for mode in modes:
            row = found[layer, mode]
            ms = {name: times["median"] for name, times in row["ms"].items()}
            cells.append(
                f"{ms[row['best_dense']]:.1f} ({row['best_dense'].removeprefix('dense ')})"
            )
            cells += (
                [f"{min(ms[name] for name in ms if name.startswith('PyTorch')):.1f}"]
                if torch
                else []
            )
            cells += [
                f"{ms['masked dense']:.1f}",
                f"{ms['chosen']:.1f} ({row['speed_up_over_dense']:.2f}x)",
            ]
        lines.append(cells)
    columns = [
        "dense, ms",
        *(["PyTorch dense, ms"] if torch else []),
        "masked, ms",
        "block-sparse, ms",
    ]
    layers = markdown(
        [f"layer at {shown:.0%}", *(f"{mode}: {column}" for mode in modes for column in columns)],
        lines,
    )
    regrets = sorted(row["regret"] for row in report["rows"])
    note = f"What is picked against the fastest that was measured: median {statistics.median(regrets):+.0%}, worst {regrets[-1]:+.0%}.\n"
    return f"{_kernel_totals(report)}\n{layers}\n{note}"


def _inference(report: dict[str, Any]) -> str:
    """bench_inference: a row for each network and pattern, the fastest dense ones first; a column
    for each batch and thread count.
    """
    places = list(dict.fromkeys((row["batch"], row["threads"]) for row in report["rows"]))
    lines = []
    for model in dict.fromkeys(row["model"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["model"] == model]
        kinds = [
            ("XLA", "", ""),
            ("PyTorch", "", ""),
            *sorted(
                {("packed", r["flops"], r["pattern"]) for r in rows if r["flops"]}, reverse=True
            ),
        ]
        for who, flops, pattern in kinds:
            mine = [
                r
                for r in rows
                if r["execution"].startswith(who)
                and (r["flops"], r["pattern"]) in ((flops, pattern), ("", "dense"))
            ]
            if not mine:
                continue
            cells = [
                model,
                f"SUBP {pattern}" if flops else f"dense, {who}",
                f"{mine[0]['gflops']:.2f}",
                f"{mine[0]['weights_mb']:.0f}",
            ]
            for place in places:
                row = min(
                    (r for r in mine if (r["batch"], r["threads"]) == place),
                    key=lambda r: r["ms_median"],
                )
                ups = [
                    f"{row[key]:.2f}x"
                    for key in ("speed_up_over_xla", "speed_up_over_pytorch")
                    if key in row and flops
                ]
                cells.append(f"{row['ms_median']:.1f}" + (f" ({', '.join(ups)})" if ups else ""))
            lines.append(cells)
    heads = [
        f"batch {batch}, {threads} thread{'s' * (threads > 1)}, ms" for batch, threads in places
    ]
    others = " and ".join(
        name
        for name, key in (("XLA", "xla"), ("PyTorch", "pytorch"))
        if f"speed_up_over_{key}" in report["rows"][0]
    )
    note = f"In brackets: times faster than the fastest dense {others}. GFLOPs are multiply-adds per image, as the papers count them.\n"
    return markdown(["network", "weights", "GFLOPs", "MB", *heads], lines, left=2) + "\n" + note


def _parts(report: dict[str, Any]) -> str:
    """bench_parts: the operations around the convolutions over all sizes, then the grouping."""
    lines, modes = [], ("forward", "forward + gradient")
    for operation in dict.fromkeys(row["operation"] for row in report["rows"]):
        cells = []
        for mode in modes:
            ratios = [
                row["nhwc_over_chwn"]
                for row in report["rows"]
                if (row["operation"], row["mode"]) == (operation, mode)
            ]
            cells.append(
                f"{statistics.geometric_mean(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})"
            )
        lines.append([operation, *cells])
    text = markdown(["NHWC time over CHWN time", *modes], lines)
    if report["grouping"]:
        lines = [
            [row["what"], *(f"{row[name]:.2f}" for name in ("second_s", "second_cpu_s", "first_s"))]
            for row in report["grouping"]
        ]
        text += "\n" + markdown(
            ["grouping", "seconds", "processor seconds", "seconds with compilation"], lines
        )
    return text


def _channel_blocks(report: dict[str, Any]) -> str:
    """channel_blocks: what runs of channels keep, in the order and as the channels were, a column
    for each sparsity.
    """
    found = {(row["network"], row["channel_block"], row["sparsity"]): row for row in report["rows"]}
    sparsities = sorted({sparsity for *_, sparsity in found})
    lines = []
    for network, run in sorted(
        {(n, run) for n, run, _ in found}, key=lambda which: (which[0].split(":")[::-1], which[1])
    ):
        model, _, kind = network.partition(":")
        rows = [found.get((network, run, sparsity)) for sparsity in sparsities]
        cells = [
            f"**{row['ordered']:.3f}** ({row['unordered']:.3f}, {row['chance']:.3f})"
            if row
            else "—"
            for row in rows
        ]
        lines.append([f"{model}, {kind} weights", str(run), *cells])
    note = "In brackets: with the channels as they were, and of blocks chosen blindly.\n"
    return (
        markdown(["network", "channels in a run", *(f"{s:.0%}" for s in sparsities)], lines)
        + "\n"
        + note
    )


def _gpu(kind: str, report: dict[str, Any]) -> str:
    from experiments.reporting import gpu_tables

    return getattr(gpu_tables, kind)(report)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "bench_kernels_gpu": functools.partial(_gpu, "kernels"),
    "bench_training_gpu": functools.partial(_gpu, "training"),
    "bench_kernels_cpu_batch": _kernel_totals,
    "bench_kernels": _kernels,
    "bench_parts": _parts,
    "bench_training": _training,
    "bench_inference": _inference,
    "channel_blocks": _channel_blocks,
    "compare": _compare,
}


if __name__ == "__main__":
    try:
        main(tyro.cli(TablesConfig, prog="python -m experiments.reporting.tables"))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
