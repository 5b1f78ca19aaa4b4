"""The tiles of the Triton kernels: which a tuner times, and which run."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

from pallas_kernels.block_sparse_conv import tuned_tables
from pallas_kernels.block_sparse_conv.plan import plan_sizes
from pallas_kernels.block_sparse_conv.spec import ConvSpec
from pallas_kernels.block_sparse_conv.triton.fitting import (
    Tile,
    fits,
    itemsize,
    multiplies_wide,
    smaller,
)
from pallas_kernels.block_sparse_conv.triton.normal_form import computed_spec, normal
from pallas_kernels.block_sparse_conv.triton.products import (
    METHODS,
    Product,
    cost,
    product,
    tile_rows,
)
from pallas_kernels.block_sparse_conv.triton.stationary import stationary_tiles
from pallas_kernels.block_sparse_conv.triton.traffic import seconds
from pallas_kernels.devices import this_device
from pallas_kernels.padding import round_up

PARTIAL_SUMS = 16 << 20
"""Bytes of partial weight gradients at most: few enough to stay in the L2 cache."""
USUAL_DEPTH = 128
"""The most rows of the weight gradient in a tile that the rule gives."""
MOST_FRUGAL = 3


def choose_tile(spec: ConvSpec, pass_name: str, capability: int = 90, method: str = "") -> Tile:
    """The tile of a pass: as tuned on this GPU, else by a rule.

    Args:
      spec: the static sizes.
      pass_name: one of `PASSES`.
      capability: of the GPU, times ten.
      method: of the input gradient; "": the tuned one, else the cheapest by estimate.

    Returns:
      The tile.

    Example:
      >>> spec = ConvSpec(cin=64, height=8, width=8, batch=256, kernel=(3, 3), cout=64, groups=2,
      ...                 kept=19, kept_taps=3, group_size=32, dtype="bfloat16")
      >>> choose_tile(spec, "forward") == Tile(32, 128, 64, stages=2, positions_first=True)
      True
    """
    fields = tuned_tables.tuned_tile("triton", tuned_key(spec, pass_name))
    if fields and method in ("", fields["method"]):
        return Tile(**fields)
    spec = computed_spec(spec, pass_name)
    if pass_name == "input_gradient" and not method:
        method = min(METHODS, key=functools.partial(cost, spec))
    if method == "dense":
        return _dense_tile()
    return _rule_tile(normal(spec), pass_name, method, capability)


def choose_norm_tile(spec: ConvSpec, capability: int = 90) -> Tile:
    """The tile of an input gradient that goes on through the norm of the input.

    From the table this is one kernel. After every other method come XLA's operations, which read
    the gradient and the input twice, for the sums and for the result, and write the result.

    Args:
      spec: the static sizes.
      capability: of the GPU, times ten.

    Returns:
      The tile.

    Example:
      >>> spec = ConvSpec(cin=64, height=8, width=8, batch=256, kernel=(3, 3), cout=64, groups=1,
      ...                 kept=16, kept_taps=3, group_size=64, dtype="bfloat16", channel_block=16)
      >>> choose_norm_tile(spec).method
      'transposed'
    """
    tile = choose_tile(spec, "input_gradient", capability)
    if tile.method == "transposed":
        return tile
    table = choose_tile(spec, "input_gradient", capability, "transposed")
    plain = normal(computed_spec(spec, "input_gradient"))
    passes = 4 * itemsize(plain) * math.prod(plain.in_shape) / this_device().memory
    saved = cost(spec, tile.method) + passes - cost(spec, table.method)
    return table if saved >= 0 else tile


def tuned_key(spec: ConvSpec, pass_name: str) -> str:
    """What the tuned table calls a pass.

    Args:
      spec: the static sizes.
      pass_name: one of `PASSES`.

    Returns:
      The key of what the kernels compute.
    """
    return tuned_tables.key(computed_spec(spec, pass_name), pass_name)


def frugal_tiles(spec: ConvSpec, pass_name: str, capability: int = 90) -> list[Tile]:
    """The tiles that take least from the L2 cache; no default, until a tuner has timed them.

    - forward: programs that keep their weights (`stationary.py`), the fastest by `traffic.seconds`.
    - input gradient: 256 positions, for which the table's weights are read half as often.
    - weight gradient: 256 gathered rows, for which the gradient is read half as often.

    Args:
      spec: the static sizes.
      pass_name: one of `PASSES`.
      capability: of the GPU, times ten.

    Returns:
      At most three tiles that fit; none in float32, and none where they would save nothing.

    Example:
      >>> spec = ConvSpec(cin=256, height=14, width=14, batch=256, kernel=(3, 3), cout=256,
      ...                 groups=4, kept=80, kept_taps=3, group_size=64, dtype="bfloat16")
      >>> frugal_tiles(spec, "weight_gradient")[0].depth
      256
    """
    plain = normal(computed_spec(spec, pass_name))
    if not multiplies_wide(plain, capability):
        return []
    if pass_name == "forward":
        stationary = stationary_tiles(plain, capability)
        return sorted(stationary, key=lambda tile: seconds(plain, pass_name, tile))[:MOST_FRUGAL]
    method = "transposed" if pass_name == "input_gradient" else ""
    p = product(plain, pass_name, method)
    rule = _rule_tile(plain, pass_name, method, capability)
    wide = dataclasses.replace(rule, warps=8)
    if pass_name == "weight_gradient":
        wide = dataclasses.replace(wide, depth=256)
        wide = dataclasses.replace(wide, splits=_splits(wide, p))
        is_wider = rule.depth < p.depth and rule.rows <= 64
    else:
        wide = dataclasses.replace(wide, positions=256)
        is_wider = p.positions >= wide.positions
    wide_tiles = [dataclasses.replace(wide, stages=stages) for stages in (4, 3)]
    return [tile for tile in wide_tiles if is_wider and fits(tile, pass_name, plain, capability)]


def candidate_tiles(spec: ConvSpec, pass_name: str, capability: int = 90) -> list[Tile]:
    """The tiles that a tuner times for a pass; in the input gradient those of every method.

    Args:
      spec: the static sizes.
      pass_name: one of `PASSES`.
      capability: of the GPU, times ten.

    Returns:
      Tiles that fit in shared memory and registers.

    Example:
      >>> spec = ConvSpec(cin=64, height=8, width=8, batch=128, kernel=(3, 3), cout=64, groups=1,
      ...                 kept=19, kept_taps=3, group_size=64, dtype="bfloat16")
      >>> Tile(64, 128, 64) in candidate_tiles(spec, "forward")
      True
    """
    plain = normal(computed_spec(spec, pass_name))
    tiles = []
    for method in METHODS if pass_name == "input_gradient" else ("",):
        if method == "dense":
            tiles.append(_dense_tile())
            continue
        rule = _rule_tile(plain, pass_name, method, capability)
        sizes = _tiles_around(rule, plain, pass_name, capability)
        for tile in _with_warps_and_stages(sizes, plain, pass_name, capability):
            if fits(tile, pass_name, plain, capability):
                tiles.append(tile)
    frugal = frugal_tiles(spec, pass_name, capability)
    return tiles + [tile for tile in frugal if tile not in tiles]


def _dense_tile() -> Tile:
    """Stands for XLA's dense convolution, which has no tile."""
    return Tile(rows=0, positions=0, depth=0, method="dense")


def _tiles_around(rule: Tile, spec: ConvSpec, pass_name: str, capability: int) -> Iterator[Tile]:
    """Tiles with the rule's rows, in other sizes; a step of float32 takes half as much."""
    is_half = spec.precision == "half"
    if pass_name == "weight_gradient":
        positions: tuple[int, ...] = (32, 64) if is_half else (16, 32)
        if multiplies_wide(spec, capability):
            positions = (32, 64, 128)
        depths: tuple[int, ...] = (64,) if spec.precision == "ieee" else (64, 128)
    else:
        positions = (64, 128, 256)
        depths = (32, 64) if is_half else (16, 32)
        if rule.method == "transposed":
            deepest = _stage_depth(spec)
            depths = tuple(dict.fromkeys(min(depth, deepest) for depth in depths))
    for size, depth in itertools.product(positions, depths):
        yield dataclasses.replace(rule, positions=size, depth=depth)


def _with_warps_and_stages(
    tiles: Iterator[Tile], spec: ConvSpec, pass_name: str, capability: int
) -> Iterator[Tile]:
    """Each tile with few and many loads in flight, and large ones with 8 warps too."""
    least_for_eight_warps = 4096 if spec.precision == "half" else 8192
    stages = (3, 4) if capability >= 90 else (2, 3)
    for tile in tiles:
        is_weight_gradient = pass_name == "weight_gradient"
        result = tile.rows * (tile.depth if is_weight_gradient else tile.positions)
        warps = (4, 8) if result > least_for_eight_warps else (4,)
        for warp_count, stage_count in itertools.product(warps, stages):
            splits = _splits(tile, product(spec, pass_name)) if is_weight_gradient else 1
            yield dataclasses.replace(tile, warps=warp_count, stages=stage_count, splits=splits)


def _rule_tile(spec: ConvSpec, pass_name: str, method: str, capability: int) -> Tile:
    """Enough programs, little padding, two programs' loads in a multiprocessor's shared memory."""
    p = product(spec, pass_name, method)
    is_half = spec.precision == "half"
    rows = tile_rows(p.members, spec.precision)
    if pass_name == "weight_gradient":
        depth = _power_of_two(p.depth, 64, 128 if is_half else 64)
        tile = Tile(rows, 64 if is_half else 32, depth)
    else:
        depth = 64 if is_half else 32
        if method == "transposed":
            depth = min(depth, _stage_depth(spec))
        elif round_up(p.depth, depth) > 1.1 * round_up(p.depth, depth // 2):
            depth //= 2
        positions = 128
        while positions > 64 and _programs(p, rows, positions) < this_device().multiprocessors:
            positions //= 2
        steps = -(-p.depth // depth)
        tile = Tile(
            rows,
            positions,
            depth,
            stages=min(4, max(2, steps)),
            method=method,
            positions_first=rows < 64 and multiplies_wide(spec, capability),
        )
    if tile.rows == 128:
        tile = dataclasses.replace(tile, warps=8)
    while not fits(tile, pass_name, spec, capability):
        tile = smaller(tile, pass_name, spec, capability)
    if pass_name == "weight_gradient":
        tile = dataclasses.replace(tile, splits=_splits(tile, p))
    return tile


def _programs(p: Product, rows: int, positions: int) -> int:
    """How many programs compute the products."""
    return p.groups * -(-p.members // rows) * -(-p.positions // positions)


def _stage_depth(spec: ConvSpec) -> int:
    """The filters of a stage of the plan's table: tiles must divide it."""
    return plan_sizes(spec.kernel_shape, spec.packed_shape, spec.channel_block).depth


def _power_of_two(size: int, low: int, high: int) -> int:
    """The power of two that holds a size, within bounds."""
    return min(high, max(low, 1 << (size - 1).bit_length()))


def _splits(tile: Tile, p: Product) -> int:
    """Shares of the positions: two programs for each multiprocessor, one of a wide tile.

    Each share has at least four steps, and the partial sums stay in the L2 cache.
    """
    filled = this_device().multiprocessors * (1 if tile.depth > USUAL_DEPTH else 2)
    programs = p.groups * -(-p.members // tile.rows) * -(-p.depth // tile.depth)
    steps = -(-p.positions // tile.positions)
    most = min(steps // 4, PARTIAL_SUMS // (4 * p.groups * p.members * p.depth))
    shares = -(-filled // programs) if tile.depth <= USUAL_DEPTH else filled // programs
    return max(1, min(shares, most))
