"""Predicts what each pass takes, in the tile that runs and in the one that loads least.

`python -m experiments.bench.gpu.predict --part "resnet50" --batch 256` prints a Markdown table. The
model is `pallas_kernels/block_sparse_conv/triton/traffic.py`: no number is measured.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import tyro

from experiments.bench.gpu import shapes
from experiments.reporting.markdown import table
from pallas_kernels.block_sparse_conv import PASSES, ConvSpec
from pallas_kernels.block_sparse_conv.triton import tiles, traffic
from pallas_kernels.block_sparse_conv.triton.fitting import itemsize
from pallas_kernels.block_sparse_conv.triton.normal_form import computed_spec, normal

XLA_BYTES, LEAST_MICROSECONDS = 4e12, 1.4
"""Bytes/s of XLA's elementwise kernels, and the least that one takes: the estimate of
docs/gpu.md."""
SHARES = (0.1, 0.3)
"""What normalising adds to a kernel that gathers, at least and at most: an expectation."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What is predicted.

    Attributes:
      part: a part of the layers' names.
      batch: images; None: all that are benchmarked.
      sparsity: fraction of the weights removed.
      group_size: filters in a group.
      channel_block: the longest runs of channels.
      prologue: compares a norm in the load with a pass that stores the normalised input instead.
    """

    part: str = ""
    batch: int | None = None
    sparsity: float = 0.9
    group_size: int = 64
    channel_block: int = 16
    prologue: bool = False


def main(config: Config) -> None:
    """Prints the table.

    Args:
      config: what is predicted.
    """
    header = ["layer", "pass", "tile", "MB", "us", "frugal tile", "MB", "us", "gain"]
    if config.prologue:
        header = ["layer", "stored first, us", "in the load, us more", "pays"]
    cells = []
    for name, spec in specs(config):
        if config.prologue:
            cells.append([name, *_prologue(spec)])
            continue
        for pass_name in PASSES:
            cells.append([name, pass_name.replace("_", " "), *_compared(spec, pass_name)])
    print(table(header, cells, text_columns=1 if config.prologue else 3))


def specs(config: Config) -> Iterator[tuple[str, ConvSpec]]:
    """Yields the convolutions by name.

    Args:
      config: what is predicted.

    Yields:
      Names and static sizes.
    """
    for case in shapes.cases(config.part):
        if config.batch in (None, case.batch):
            spec = shapes.case_spec(
                case,
                sparsity=config.sparsity,
                group_size=config.group_size,
                channel_block=config.channel_block,
            )
            yield case.name, spec


def _prologue(spec: ConvSpec) -> list[str]:
    """What storing the normalised input takes, and what normalising in the load adds."""
    nbytes = 2 * itemsize(spec) * math.prod(spec.in_shape)
    stored = max(1e6 * nbytes / XLA_BYTES, LEAST_MICROSECONDS)
    passes = ("forward", "weight_gradient")
    kernels = sum(
        1e6 * traffic.seconds(normal(spec), name, tiles.choose_tile(spec, name)) for name in passes
    )
    least, most = (share * kernels for share in SHARES)
    verdict = "yes" if most < stored else "no" if least > stored else "unclear"
    return [f"{stored:.1f}", f"{least:.1f} to {most:.1f}", verdict]


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
