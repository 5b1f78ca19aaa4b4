"""Measures how much score is kept when channels come in runs, with and without a channel order.

`python -m experiments.bench.channel_blocks` covers whole networks at HRBP's default settings. It
orders every channel space (`blocksparse_jax.channel_orders`), then groups it with runs of channels
and with single channels, which keep equally many, and compares the kept scores. Of the spaces whose
layers have the same shapes it measures one and counts it as often as they occur; of each network it
measures only the spaces with the most weights. Most of the time goes into compiling the grouping,
once for each layer shape, kept count and length of run. The report is written row by row, and
`--resume` continues it.
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from blocksparse_jax._checks import divisor
from blocksparse_jax.grouping.channel_order import Consumer, channel_order, run_ratio
from blocksparse_jax.grouping.channel_spaces import space_consumers
from experiments.bench import command
from experiments.bench.network_weights import draw
from experiments.measuring.environment import origin
from experiments.models.spaces import channel_spaces
from experiments.reporting import markdown, results
from experiments.reporting.reports import channel_blocks as report_tables


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured.

    Attributes:
      networks: model:weights, see `network_weights.draw`.
      channel_blocks: channels in a run.
      sparsities: of static HRBP, uniform.
      group_size: filters in a group.
      spaces: how many different spaces of each network are measured, those with the most weights.
      epochs: of the training.
      resume: keep the rows that the report has, and measure the others.
      out: JSON file; None is experiments/results/channel_blocks.json.
    """

    networks: tuple[str, ...] = (
        "cnn:trained",
        "vgg19:random",
        "vgg19:clustered",
        "resnet50:random",
        "resnet50:clustered",
    )
    channel_blocks: tuple[int, ...] = (8, 16, 32)
    sparsities: tuple[float, ...] = (0.8, 0.9, 0.95)
    group_size: int = 32
    spaces: int = 4
    epochs: int = 3
    resume: bool = False
    out: str | None = None


def main(config: Config) -> dict[str, Any]:
    """Measures, prints the table and writes the report.

    Args:
      config: what is measured.

    Returns:
      The report: "rows", one for each network, sparsity and channel block, device, versions and
      commit.

    Raises:
      ValueError: an unknown network or kind of weights, or sizes that the library refuses.
    """
    out = Path(config.out) if config.out else results.RESULTS / "channel_blocks.json"
    settings = {name: getattr(config, name) for name in ("group_size", "spaces", "epochs")}
    rows = _measured_rows(out, settings) if config.resume and out.exists() else []
    report = settings | origin() | {"rows": rows}
    measured = {(row["network"], row["sparsity"], row["channel_block"]) for row in rows}
    for network in config.networks:
        missing = [
            (sparsity, channel_block)
            for sparsity in config.sparsities
            for channel_block in config.channel_blocks
            if (network, sparsity, channel_block) not in measured
        ]
        params = draw(network, config.epochs) if missing else None
        for sparsity, channel_block in missing:
            row = measure(params, sparsity, channel_block, config.group_size, config.spaces)
            rows.append({"network": network, **row})
            results.write(report, out)
    markdown.show(report_tables.table(report))
    return report


def _measured_rows(out: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier report, which must have been measured with the same settings."""
    report = json.loads(out.read_text())
    earlier = {name: report[name] for name in settings}
    if settings != earlier:
        raise ValueError(f"resume: {out} was measured with {earlier}, not {settings}")
    return report["rows"]


def measure(
    params: Any, sparsity: float, channel_block: int, group_size: int, most: int
) -> dict[str, Any]:
    """Orders the largest spaces of a network and compares the scores that runs keep.

    Args:
      params: of a network of the zoo.
      sparsity: of static HRBP.
      channel_block: channels in a run.
      group_size: filters in a group.
      most: different spaces at most.

    Returns:
      A row of the report. `ordered`, `unordered` and `chance` are kept scores over that of
      single-channel lists, summed over the spaces (chance: runs, filters and taps chosen at
      random); `worst` is the lowest `ordered` of a space; `covered` is the fraction of the sparse
      weights that the measured spaces hold; `seconds` include compiling.
    """
    start = time.perf_counter()
    consumers_by_space = space_consumers(
        params, channel_spaces(params), sparsity, channel_block=channel_block, group_size=group_size
    )
    alike: dict[Any, list[str]] = {}  # spaces whose layers have the same sizes
    for space, named in consumers_by_space.items():
        sizes = sorted((consumer.scores.shape, *consumer[1:]) for consumer in named.values())
        alike.setdefault(tuple(sizes), []).append(space)
    weights = {
        sizes: len(spaces) * sum(math.prod(shape) for shape, *_ in sizes)
        for sizes, spaces in alike.items()
    }
    largest = sorted(alike, key=lambda sizes: -weights[sizes])[:most]
    kept = dict.fromkeys(("ordered", "unordered", "chance", "single"), 0.0)
    measured_spaces: list[dict[str, Any]] = []
    for sizes in largest:
        spaces = alike[sizes]
        consumers = list(consumers_by_space[spaces[0]].values())
        block = divisor(sizes[0][0][2], channel_block)
        order = channel_order(consumers, channel_block=block)
        ratio = run_ratio(consumers, order, channel_block=block)
        kept["ordered"] += len(spaces) * ratio.ordered * ratio.single
        kept["unordered"] += len(spaces) * ratio.unordered * ratio.single
        kept["single"] += len(spaces) * ratio.single
        kept["chance"] += len(spaces) * sum(_chance(consumer) for consumer in consumers)
        measured_spaces.append(
            {
                "space": spaces[0],
                "times": len(spaces),
                "ordered": round(ratio.ordered, 4),
                "unordered": round(ratio.unordered, 4),
            }
        )
    row: dict[str, Any] = {"sparsity": sparsity, "channel_block": channel_block}
    for name in ("ordered", "unordered", "chance"):
        row[name] = round(kept[name] / kept["single"], 4)
    covered = sum(weights[sizes] for sizes in largest) / sum(weights.values())
    return row | {
        "worst": min(space["ordered"] for space in measured_spaces),
        "covered": round(covered, 3),
        "seconds": round(time.perf_counter() - start, 1),
        "spaces": measured_spaces,
    }


def _chance(consumer: Consumer) -> float:
    """The score that blocks chosen at random keep, on average."""
    kh, kw, cin, _ = consumer.scores.shape
    kept_fraction = consumer.kept * consumer.kept_taps / (kh * kw * cin)
    return float(jnp.sum(consumer.scores)) * kept_fraction


def cli(arguments: Sequence[str]) -> int:
    """Runs the command.

    Args:
      arguments: without the program's name.

    Returns:
      The exit status.
    """
    return command.run(Config, main, "experiments.bench.channel_blocks", __doc__, arguments)


if __name__ == "__main__":
    raise SystemExit(cli(sys.argv[1:]))
