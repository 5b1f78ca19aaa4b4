"""Predicts what each pass takes, in the tile that runs and in the one that loads least.

`python -m experiments.bench.gpu.predict --part "resnet50" --batch 256` prints a Markdown table. The
model is `pallas_kernels/block_sparse_conv/triton/traffic.py`: no number is measured.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import tyro

from experiments.bench.gpu import shapes
from experiments.reporting.markdown import table
from pallas_kernels.block_sparse_conv import PASSES, ConvSpec
from pallas_kernels.block_sparse_conv.triton import tiles, traffic
from pallas_kernels.block_sparse_conv.triton.normal_form import computed_spec, normal


@dataclasses.dataclass(frozen=True)
class Config:
    """What is predicted.

    Attributes:
      part: a part of the layers' names.
      batch: images; None: all that are benchmarked.
      sparsity: fraction of the weights removed.
      group_size: filters in a group.
      channel_block: the longest runs of channels.
    """

    part: str = ""
    batch: int | None = None
    sparsity: float = 0.9
    group_size: int = 64
    channel_block: int = 16


def main(config: Config) -> None:
    """Prints the table.

    Args:
      config: what is predicted.
    """
    header = ["layer", "pass", "tile", "MB", "us", "frugal tile", "MB", "us", "gain"]
    print(table(header, list(rows(config)), text_columns=3))


def rows(config: Config) -> Iterator[list[str]]:
    """Yields a row for each layer and pass.

    Args:
      config: what is predicted.

    Yields:
      The cells.
    """
    for case in shapes.cases(config.part):
        if config.batch not in (None, case.batch):
            continue
        spec = shapes.case_spec(
            case,
            sparsity=config.sparsity,
            group_size=config.group_size,
            channel_block=config.channel_block,
        )
        for pass_name in PASSES:
            yield [case.name, pass_name.replace("_", " "), *_compared(spec, pass_name)]


def _compared(spec: ConvSpec, pass_name: str) -> list[str]:
    """The cells of the tile that runs, and of the fastest frugal one."""
    method = "transposed" if pass_name == "input_gradient" else ""
    runs = tiles.choose_tile(spec, pass_name, method=method)
    plain = normal(computed_spec(spec, pass_name))
    frugal = tiles.frugal_tiles(spec, pass_name)

    def microseconds(tile: Any) -> float:
        return 1e6 * traffic.seconds(plain, pass_name, tile)

    cells = []
    for tile in (runs, *sorted(frugal, key=microseconds)[:1]):
        mb = traffic.l2_bytes(plain, pass_name, tile) / 1e6
        cells += [_name(tile), f"{mb:.0f}", f"{microseconds(tile):.1f}"]
    if not frugal:
        return [*cells, "-", "-", "-", "-"]
    gain = microseconds(runs) / min(map(microseconds, frugal))
    return [*cells, f"{gain:.2f}x"]


def _name(tile: Any) -> str:
    """`rows x positions x depth`, and what else sets a tile apart."""
    sizes = f"{tile.rows}x{tile.positions}x{tile.depth}, {tile.warps} warps, {tile.stages} stages"
    return f"{sizes}, {tile.walkers} walkers" if tile.walkers else sizes


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
