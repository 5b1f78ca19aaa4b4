"""What a pass takes from the L2 cache in a tile, and the time that follows: a model, not a clock.

The kernels wait for gathered rows most of all. A pass takes `KERNEL_MS`, and the longest of: its
bytes at the rate of gathers, its products at the rate of the tensor cores, and its activations at
the rate of the memory. Few programs leave multiprocessors idle, and so do those that walk, at the
end.
"""

import math

from pallas_kernels.block_sparse_conv.spec import ConvSpec
from pallas_kernels.block_sparse_conv.triton.fitting import Tile, itemsize
from pallas_kernels.block_sparse_conv.triton.products import Product, product
from pallas_kernels.devices import this_device

KERNEL_MS = 2.5e-3
"""What a pass takes beside its work."""


def l2_bytes(spec: ConvSpec, pass_name: str, tile: Tile) -> int:
    """The bytes that the programs of a pass load: gathered rows, weights, gradients.

    Args:
      spec: a normal spec (see `normal_form`).
      pass_name: one of `PASSES`.
      tile: of the pass; not "dense".

    Returns:
      Bytes. An input gradient's table is taken at its expected length.

    Example:
      >>> from pallas_kernels.block_sparse_conv.triton.normal_form import normal
      >>> spec = normal(ConvSpec(cin=256, height=14, width=14, batch=256, kernel=(3, 3), cout=256,
      ...                        groups=4, kept=80, kept_taps=3, group_size=64, dtype="bfloat16",
      ...                        padding=((1, 1), (1, 1))))
      >>> l2_bytes(spec, "forward", Tile(64, 128, 64)) // 10**6
      144
      >>> l2_bytes(spec, "forward", Tile(64, 64, 256, walkers=33)) // 10**6
      100
    """
    p = product(spec, pass_name, tile.method)
    row_tiles = -(-p.members // tile.rows)
    if pass_name == "weight_gradient":
        gradient_rows = p.members * -(-p.depth // tile.depth)
        return itemsize(spec) * p.groups * (p.depth * row_tiles + gradient_rows) * p.positions
    readers = tile.walkers or -(-p.positions // tile.positions)
    gathered = row_tiles * p.depth * p.positions
    return itemsize(spec) * p.groups * (gathered + readers * p.depth * p.members)


def seconds(spec: ConvSpec, pass_name: str, tile: Tile) -> float:
    """The predicted time of a pass.

    Args:
      spec, pass_name, tile: as for `l2_bytes`.

    Returns:
      Seconds.
    """
    device = this_device()
    p = product(spec, pass_name, tile.method)
    flops = 2 * p.groups * _padded(p, pass_name, tile) * p.positions
    memory = itemsize(spec) * (math.prod(spec.in_shape) + math.prod(spec.out_shape))
    work = max(
        l2_bytes(spec, pass_name, tile) / device.gather,
        flops / device.flops(spec.precision),
        memory / device.memory,
    )
    return KERNEL_MS * 1e-3 + work / busy_share(p, pass_name, tile)


def busy_share(p: Product, pass_name: str, tile: Tile) -> float:
    """The share of the multiprocessors' time in which they have work.

    Args:
      p: the products of the pass.
      pass_name: one of `PASSES`.
      tile: of the pass.

    Returns:
      At most 1. Programs that do not walk leave multiprocessors idle only where they are too few.

    Example:
      >>> p = Product(groups=44, members=64, depth=64, positions=640)
      >>> busy_share(p, "forward", Tile(64, 64, 64, walkers=3))
      0.8333333333333334
    """
    row_tiles = -(-p.members // tile.rows)
    tiles = -(-p.positions // tile.positions)
    programs = p.groups * row_tiles * (tile.walkers or tiles)
    if pass_name == "weight_gradient":
        programs = p.groups * row_tiles * -(-p.depth // tile.depth) * tile.splits
    multiprocessors = this_device().multiprocessors
    if not tile.walkers:
        return min(1.0, programs / multiprocessors)
    rounds = -(-programs // multiprocessors)
    used = programs / (rounds * multiprocessors)
    return used * tiles / (tile.walkers * -(-tiles // tile.walkers))


def _padded(p: Product, pass_name: str, tile: Tile) -> int:
    """Rows times depth of the products of a group, filled up to tiles."""
    rows = -(-p.members // tile.rows) * tile.rows
    return rows * (-(-p.depth // tile.depth) * tile.depth)
