"""The tiles of the forward pass by programs that keep the weights of one group (`walkers`)."""

import dataclasses
import itertools

from pallas_kernels.block_sparse_conv.spec import ConvSpec
from pallas_kernels.block_sparse_conv.triton.fitting import (
    Tile,
    fits,
    multiplies_wide,
    shared_bytes,
)
from pallas_kernels.block_sparse_conv.triton.products import product, tile_rows
from pallas_kernels.devices import shared_memory, this_device

POSITIONS, STAGES = (64, 128, 256), (4, 3, 2)
SUMS = 64
"""float32 sums in each thread: beside the addresses of all rows 128 would spill."""
DEEPEST_TO_NORMALISE = 256
"""The most rows of which a thread holds its share of 64 positions while it normalises them."""
RESERVED = 1024
"""Bytes of shared memory that the system takes of each program."""


def stationary_tiles(spec: ConvSpec, capability: int = 90) -> list[Tile]:
    """The tiles in which a program keeps its weights: for each width the most loads in flight.

    One program fills a multiprocessor with 8 warps, or two share it with 4 warps each.

    Args:
      spec: a normal spec (see `normal_form`).
      capability: of the GPU, times ten.

    Returns:
      The tiles that fit, the widest first; none in float32 and on GPUs before Hopper, where the
      operands of a whole contraction would lie in registers.

    Example:
      >>> from pallas_kernels.block_sparse_conv.triton.normal_form import normal
      >>> spec = ConvSpec(cin=256, height=14, width=14, batch=256, kernel=(3, 3), cout=256,
      ...                 groups=4, kept=80, kept_taps=3, group_size=64, dtype="bfloat16")
      >>> tile = stationary_tiles(normal(spec))[-1]
      >>> tile == Tile(64, 64, 256, warps=8, stages=4, walkers=33)
      True
    """
    if not multiplies_wide(spec, capability):
        return []
    p = product(spec, "forward")
    rows = tile_rows(p.members, spec.precision)
    depth = max(16, 1 << (p.depth - 1).bit_length())
    teams = p.groups * -(-p.members // rows)
    tiles = []
    for positions, (warps, programs) in itertools.product(reversed(POSITIONS), ((4, 2), (8, 1))):
        if positions > max(POSITIONS[0], p.positions) or rows * positions > SUMS * 32 * warps:
            continue
        walkers = max(1, programs * this_device().multiprocessors // teams)
        tile = Tile(
            rows,
            positions,
            depth,
            warps=warps,
            positions_first=rows < 64,
            walkers=min(walkers, -(-p.positions // positions)),
        )
        for stages in STAGES:
            tile = dataclasses.replace(tile, stages=stages)
            taken = shared_bytes(tile, "forward", spec) + RESERVED
            is_room = programs * taken <= shared_memory(capability)
            if is_room and fits(tile, "forward", spec, capability):
                tiles.append(tile)
                break
    return tiles


def tile_with_norm(tile: Tile) -> Tile:
    """The tile in which a pass normalises what it gathers.

    Args:
      tile: of the pass without a norm.

    Returns:
      The same; narrower where a program keeps its weights and registers would spill.

    Example:
      >>> tile_with_norm(Tile(64, 64, 512, warps=8, stages=2, walkers=16)).positions
      32
    """
    if tile.walkers and tile.depth > DEEPEST_TO_NORMALISE:
        return dataclasses.replace(tile, positions=min(tile.positions, 32))
    return tile
