"""The tiles of the Mosaic GPU kernels: which a tuner times, and which run."""

import dataclasses
import math

from pallas_kernels.block_sparse_conv import tuned_tables
from pallas_kernels.block_sparse_conv.mosaic_gpu.geometry import Pixels, pixels
from pallas_kernels.block_sparse_conv.spec import ConvSpec
from pallas_kernels.devices import this_device

BARRIER_BYTES = 2048
"""Shared memory that is left for barriers and alignment."""
MOST_STAGES = 6


@dataclasses.dataclass(frozen=True)
class Tile:
    """The work of one thread block.

    Attributes:
      rows: rows of the product, 64 or 128: filters (forward, weight gradient) or input channels
        (input gradient), padded with zeros.
      columns: columns of the product: output values (pixels times images), or gathered rows (weight
        gradient).
      images: images that one copy brings; `columns // images` pixels make a tile (weight gradient:
        the images of one step).
      depth: how much of the contracted axis one pipeline stage holds.
      stages: pipeline stages in shared memory.
      consumers: warpgroups that multiply, each a share of the columns; one more only copies.
      splits: shares of the pixels that are summed separately (weight gradient).
    """

    rows: int
    columns: int
    images: int
    depth: int = 64
    stages: int = 4
    consumers: int = 2
    splits: int = 1


def choose_tile(spec: ConvSpec, pass_name: str) -> Tile:
    """The tile of a pass: the tuned one where the table has the shape, else by a rule.

    The rule: the gathered rows are read again for every block of output rows, and the weights for
    every tile of columns, so large tiles read least; but every multiprocessor should have two tiles
    or more.

    Args:
      spec: the static sizes.
      pass_name: one of `PASSES`.

    Returns:
      The tile.

    Example:
      >>> spec = ConvSpec(cin=64, height=8, width=8, batch=128, kernel=(3, 3), cout=64, groups=2,
      ...                 kept=16, kept_taps=3, group_size=32)
      >>> choose_tile(spec, "forward").columns
      64
    """
    if fields := tuned_tables.tuned_tile("mosaic_gpu", tuned_tables.key(spec, pass_name)):
        return Tile(**fields)
    candidates = candidate_tiles(spec, pass_name)
    if pass_name == "weight_gradient":
        return _weight_gradient_rule(spec, candidates)
    sizes = pixels(spec, pass_name)
    values = math.prod(sizes.output) * sizes.images

    def fills_the_device(tile: Tile) -> bool:
        blocks = spec.groups if pass_name == "forward" else -(-spec.cin // tile.rows)
        return blocks * values >= 2 * this_device().multiprocessors * tile.columns

    order = sorted(candidates, key=lambda tile: (tile.rows * tile.columns, tile.rows, -tile.depth))
    return next((tile for tile in reversed(order) if fills_the_device(tile)), order[0])


def _weight_gradient_rule(spec: ConvSpec, candidates: list[Tile]) -> Tile:
    """The fewest parts of the gathered rows; of these tiles the narrowest, in deep steps.

    A deep step must leave room for at least three stages.
    """
    gathered = spec.kept * spec.kept_taps
    fewest_parts = min(-(-gathered // tile.columns) for tile in candidates)
    wide = [tile for tile in candidates if -(-gathered // tile.columns) == fewest_parts]
    narrowest = min(tile.columns for tile in wide)
    return max(
        (tile for tile in wide if tile.columns == narrowest),
        key=lambda tile: tile.depth * (tile.stages >= 3),
    )


def candidate_tiles(spec: ConvSpec, pass_name: str) -> list[Tile]:
    """The tiles worth timing for a pass of a convolution, the rule's among them.

    Args:
      spec: the static sizes.
      pass_name: one of `PASSES`.

    Returns:
      The tiles; all fit in shared memory and registers.

    Example:
      >>> spec = ConvSpec(cin=64, height=8, width=8, batch=128, kernel=(3, 3), cout=64, groups=2,
      ...                 kept=16, kept_taps=3, group_size=32)
      >>> [(tile.rows, tile.columns, tile.images) for tile in candidate_tiles(spec, "forward")]
      [(64, 64, 64), (64, 128, 128), (64, 256, 128)]
    """
    sizes = pixels(spec, pass_name)
    if pass_name == "weight_gradient":
        return _weight_gradient_tiles(spec, sizes)
    image_counts = [count for count in (64, 128, 256) if sizes.images % count == 0]
    if pass_name == "input_gradient":
        heights = [64, 128] if spec.cin > 64 else [64]
    else:
        heights = [128 if spec.group_size > 64 else 64]
    tiles = []
    for rows in heights:
        for columns in (64, 128, 256):
            is_small = (rows, columns) == (64, 128) and pass_name == "input_gradient"
            for depth in (64, 128) if is_small else (64,):
                images = max(count for count in image_counts if count <= columns)
                tile = Tile(rows, columns, images, depth, consumers=min(2, columns // 64))
                tiles.append(_with_most_stages(tile, pass_name))
    return tiles


def _weight_gradient_tiles(spec: ConvSpec, sizes: Pixels) -> list[Tile]:
    rows = 128 if spec.group_size > 64 else 64
    gathered = spec.kept * spec.kept_taps
    tiles = []
    for columns in (64, 128, 256):
        if columns > 64 and columns >= 2 * gathered:
            break
        for images in (64, 128):
            if sizes.images % images:
                continue
            blocks = spec.groups * -(-gathered // columns)
            steps = math.prod(sizes.output) * sizes.images // images
            tile = Tile(
                rows,
                columns,
                images,
                depth=images,
                consumers=min(2, columns // 64),
                splits=_splits(blocks, steps),
            )
            tiles.append(_with_most_stages(tile, "weight_gradient"))
    return tiles


def shared_memory(tile: Tile, pass_name: str, itemsize: int = 2) -> int:
    """Bytes of shared memory of a tile: the pipeline stages and the staged result.

    Args:
      tile: the tile.
      pass_name: one of `PASSES`.
      itemsize: bytes of an activation.

    Returns:
      The bytes, without barriers.

    Example:
      >>> shared_memory(Tile(64, 256, 256), "input_gradient")
      196608
    """
    pad = tile.columns // 64 * 8 if pass_name == "forward" else 0
    staged = 0 if pass_name == "weight_gradient" else tile.rows * (tile.columns + pad)
    return itemsize * (tile.stages * tile.depth * (tile.rows + tile.columns) + staged)


def most_shared_memory() -> int:
    """Bytes of shared memory that a tile may take.

    Returns:
      The device's, less room for barriers and alignment.

    Example:
      >>> most_shared_memory() > 64 * 1024
      True
    """
    return this_device().shared_memory - BARRIER_BYTES


def _with_most_stages(tile: Tile, pass_name: str) -> Tile:
    """The tile with as many stages as fit, at most `MOST_STAGES`."""
    deeper = [dataclasses.replace(tile, stages=stages) for stages in range(2, MOST_STAGES + 1)]
    limit = most_shared_memory()
    return [tile for tile in deeper if shared_memory(tile, pass_name) <= limit][-1]


def _splits(blocks: int, steps: int) -> int:
    """Shares of the pixels that fill the multiprocessors in few whole waves.

    Each share has at least 8 steps.
    """
    multiprocessors = this_device().multiprocessors
    most = max(1, min(steps // 8, 4 * multiprocessors // blocks))

    def idle(splits: int) -> float:
        waves = -(-blocks * splits // multiprocessors)
        return waves * multiprocessors / (blocks * splits) + 0.02 * waves

    return min(range(1, most + 1), key=idle)
