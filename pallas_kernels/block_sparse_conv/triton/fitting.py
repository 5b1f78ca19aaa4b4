"""Tiles of the Triton kernels, and which of them registers and shared memory allow."""

import dataclasses
from typing import NamedTuple

from pallas_kernels.block_sparse_conv.spec import ConvSpec
from pallas_kernels.devices import shared_memory

WIDE_TENSOR_CORES = (90, 100, 103)
"""Capabilities whose tensor cores multiply 64 rows at a time from shared memory (wgmma)."""
ACCUMULATORS = 128
"""float32 sums in each thread, beside the addresses of the loads: what 255 registers hold."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """What one program computes, and how.

    Attributes:
      rows: filters (in the input gradient: channels) of the result.
      positions: output values in each row; the weight gradient contracts over them.
      depth: gathered rows in one step of the contraction; in the weight gradient, of the result.
      warps: threads / 32.
      stages: steps whose loads are in flight.
      positions_first: the product is `positions x rows` and not `rows x positions`; the first side
        must be at least 64 for Hopper's tensor cores.
      splits: shares of the positions in the weight gradient, each with its own partial sums.
      walkers: of the forward pass: programs of each group and tile of rows that keep their weights
        and share the positions; the depth is then the whole contraction. 0: a program for each
        tile, which reads its weights again.
      method: of the input gradient: "transposed", "scatter" or "dense".
    """

    rows: int
    positions: int
    depth: int
    warps: int = 4
    stages: int = 4
    positions_first: bool = False
    splits: int = 1
    method: str = ""
    walkers: int = 0


class SpillingTile(NamedTuple):
    """A tile that keeps a few words in local memory though registers are left.

    Attributes:
      capability: of the GPU, times ten.
      arithmetic: "half", "tf32" or "ieee".
      pass_name: one of `PASSES`.
      method: of the input gradient.
      rows, positions: of the tile.
      depth, stages: of the tile; None stands for all.
    """

    capability: int
    arithmetic: str
    pass_name: str
    method: str
    rows: int
    positions: int
    depth: int | None = None
    stages: int | None = None


# Found by compiling candidates with Triton 3.6 and 3.9 (`make slow`), each in some layer.
SPILLING_TILES = (
    SpillingTile(80, "half", "forward", "", 32, 64, 32),
    SpillingTile(80, "half", "forward", "", 32, 256, 32, 3),
    SpillingTile(80, "half", "forward", "", 128, 64, 32, 3),
    SpillingTile(80, "half", "input_gradient", "scatter", 32, 64, 64),
    SpillingTile(80, "half", "input_gradient", "transposed", 16, 256, 64, 3),
    SpillingTile(80, "tf32", "forward", "", 32, 64, 16, 3),
    SpillingTile(80, "tf32", "input_gradient", "scatter", 32, 64, 32, 2),
    SpillingTile(80, "tf32", "weight_gradient", "", 32, 16, 128, 3),
    SpillingTile(80, "ieee", "input_gradient", "transposed", 16, 256),
    SpillingTile(80, "ieee", "input_gradient", "transposed", 32, 128, 16, 3),
    SpillingTile(80, "ieee", "input_gradient", "transposed", 32, 128, 16, 4),
    SpillingTile(90, "tf32", "input_gradient", "scatter", 32, 128, 16, 3),
    SpillingTile(90, "ieee", "weight_gradient", "", 32, 32, 64),
    SpillingTile(90, "ieee", "input_gradient", "transposed", 16, 256),
    SpillingTile(90, "ieee", "input_gradient", "scatter", 32, 128, 16, 2),
    SpillingTile(90, "ieee", "input_gradient", "scatter", 32, 128, 32),
    SpillingTile(90, "ieee", "input_gradient", "scatter", 32, 256, 32, 3),
    SpillingTile(90, "ieee", "input_gradient", "scatter", 64, 64, 16, 4),
    SpillingTile(90, "ieee", "input_gradient", "scatter", 64, 64, 32),
    SpillingTile(90, "ieee", "input_gradient", "scatter", 64, 128, 32),
)


def itemsize(spec: ConvSpec) -> int:
    """Bytes of one activation.

    Args:
      spec: the static sizes.

    Returns:
      4 or 2.
    """
    return 4 if spec.dtype == "float32" else 2


def shared_bytes(tile: Tile, pass_name: str, spec: ConvSpec) -> int:
    """Shared memory of a program: of the loads in flight, or of the result on its way out.

    Where gathered rows are normalised, one stage holds them on their way to the product.

    Args:
      tile: the tile.
      pass_name: one of `PASSES`.
      spec: the static sizes.

    Returns:
      Bytes; Triton may take up to 1 KiB more.
    """
    if tile.walkers:
        kept = tile.rows * tile.depth + tile.stages * tile.depth * tile.positions
        return itemsize(spec) * (kept + tile.rows * tile.positions)
    if pass_name == "weight_gradient":
        step, result = tile.positions * (tile.rows + tile.depth), tile.rows * tile.depth
    else:
        step, result = tile.depth * (tile.rows + tile.positions), tile.rows * tile.positions
    return max(itemsize(spec) * tile.stages * step, 4 * result)


def fits(tile: Tile, pass_name: str, spec: ConvSpec, capability: int) -> bool:
    """Whether a tile needs no more registers and shared memory than there are.

    Args:
      tile: the tile.
      pass_name: one of `PASSES`.
      spec: a normal spec (see `normal_form`).
      capability: of the GPU, times ten.

    Returns:
      Whether it fits.
    """
    if shared_bytes(tile, pass_name, spec) > shared_memory(capability) - 1024:
        return False
    return (
        _holds_sums(tile, pass_name, spec, capability)
        and not _is_too_deep(tile, pass_name, spec, capability)
        and not _spills(tile, pass_name, spec, capability)
    )


def smaller(tile: Tile, pass_name: str, spec: ConvSpec, capability: int) -> Tile:
    """Reduces what does not fit: the result, a step, or the loads in flight.

    Args:
      tile: one that does not fit.
      pass_name, spec, capability: as for `fits`.

    Returns:
      The next tile to try.
    """
    narrower = dataclasses.replace(tile, positions=tile.positions // 2)
    shallower = dataclasses.replace(tile, depth=tile.depth // 2)
    result_is_rows_by_depth = pass_name == "weight_gradient"
    if not result_is_rows_by_depth and not _holds_sums(tile, pass_name, spec, capability):
        return narrower
    if _is_too_deep(tile, pass_name, spec, capability):
        return shallower
    if _spills(tile, pass_name, spec, capability):
        least_depth = 32 if spec.precision == "half" else 16
        if result_is_rows_by_depth or (tile.depth == least_depth and tile.stages == 2):
            return narrower
        if tile.depth > least_depth:
            return shallower
    if tile.stages > 2:
        return dataclasses.replace(tile, stages=tile.stages - 1)
    return shallower


def multiplies_wide(spec: ConvSpec, capability: int) -> bool:
    """Whether tensor cores multiply 64 rows at a time: the product should then have 64 in front.

    Args:
      spec: a normal spec (see `normal_form`).
      capability: of the GPU, times ten.

    Returns:
      True for bfloat16 and float16 on Hopper and newer data centre GPUs.
    """
    return spec.precision == "half" and capability in WIDE_TENSOR_CORES


def _holds_sums(tile: Tile, pass_name: str, spec: ConvSpec, capability: int) -> bool:
    """Whether the sums fit beside what else a thread holds.

    Tensor cores before Hopper's take their operands from registers too, and a scatter holds the
    addresses of its sums in memory.
    """
    result = tile.rows * (tile.depth if pass_name == "weight_gradient" else tile.positions)
    most = ACCUMULATORS if multiplies_wide(spec, capability) else ACCUMULATORS // 2
    if capability < 90 and tile.method == "scatter":
        most //= 2
    return result <= most * 32 * tile.warps


def _is_too_deep(tile: Tile, pass_name: str, spec: ConvSpec, capability: int) -> bool:
    """Whether a step has more operands than registers hold.

    True float32 on Ampere keeps the operands of a step in registers.
    """
    is_ieee_on_ampere = capability < 90 and spec.precision == "ieee"
    return is_ieee_on_ampere and pass_name != "weight_gradient" and tile.depth > 16


def _spills(tile: Tile, pass_name: str, spec: ConvSpec, capability: int) -> bool:
    """Whether a tile is one of `SPILLING_TILES`."""
    for spilling in SPILLING_TILES:
        compiled = SpillingTile(
            capability,
            spec.precision,
            pass_name,
            tile.method,
            tile.rows,
            tile.positions,
            None if spilling.depth is None else tile.depth,
            None if spilling.stages is None else tile.stages,
        )
        if compiled == spilling:
            return True
    return False
