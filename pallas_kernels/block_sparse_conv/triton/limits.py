"""Tiles of the Triton kernels, and what registers and shared memory allow."""

import dataclasses

from pallas_kernels.block_sparse_conv.spec import ConvSpec

SHARED_KIB = {
    80: 163,
    86: 99,
    87: 163,
    89: 99,
    90: 227,
    100: 227,
    103: 227,
    120: 99,
    121: 99,
}  # of one program, by capability
WIDE_TENSOR_CORES = (90, 100, 103)  # those that multiply 64 rows at a time from shared memory
# float32 of the result in each thread, beside the addresses of the loads: what 255 registers hold
ACCUMULATORS = 128
# Tiles that keep a few words in local memory in some layer though registers are left, with Triton
# 3.6 or 3.9, found by compiling candidates (`make slow`): capability, arithmetic, pass, method,
# rows, positions and, unless all are meant, depth and stages.
SPILLING = (
    (80, "half", "forward", "", 32, 64, 32),
    (80, "half", "forward", "", 32, 256, 32, 3),
    (80, "half", "forward", "", 128, 64, 32, 3),
    (80, "half", "input_gradient", "scatter", 32, 64, 64),
    (80, "half", "input_gradient", "transposed", 16, 256, 64, 3),
    (80, "tf32", "forward", "", 32, 64, 16, 3),
    (80, "tf32", "input_gradient", "scatter", 32, 64, 32, 2),
    (80, "tf32", "weight_gradient", "", 32, 16, 128, 3),
    (80, "ieee", "input_gradient", "transposed", 16, 256),
    (80, "ieee", "input_gradient", "transposed", 32, 128, 16, 3),
    (80, "ieee", "input_gradient", "transposed", 32, 128, 16, 4),
    (90, "tf32", "input_gradient", "scatter", 32, 128, 16, 3),
    (90, "ieee", "weight_gradient", "", 32, 32, 64),
    (90, "ieee", "input_gradient", "transposed", 16, 256),
    (90, "ieee", "input_gradient", "scatter", 32, 128, 16, 2),
    (90, "ieee", "input_gradient", "scatter", 32, 128, 32),
    (90, "ieee", "input_gradient", "scatter", 32, 256, 32, 3),
    (90, "ieee", "input_gradient", "scatter", 64, 64, 16, 4),
    (90, "ieee", "input_gradient", "scatter", 64, 64, 32),
    (90, "ieee", "input_gradient", "scatter", 64, 128, 32),
)


@dataclasses.dataclass(frozen=True)
class Tile:
    """What one program computes, and how.

    Attributes:
      rows: filters (of the input gradient: channels) of the result.
      positions: output values in each row; the weight gradient contracts over them.
      depth: gathered rows in one step of the contraction; in the weight gradient, of the result.
      warps, stages: threads / 32, and steps whose loads are in flight.
      positions_first: the product is `positions x rows` and not `rows x positions`; the first must
        be 64 for Hopper's tensor cores.
      splits: shares of the positions in the weight gradient, each with partial sums of its own.
      method: of the input gradient: transposed, scatter or dense.
    """

    rows: int
    positions: int
    depth: int
    warps: int = 4
    stages: int = 4
    positions_first: bool = False
    splits: int = 1
    method: str = ""


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

    Args:
      tile: the tile.
      pass_name: forward, input_gradient or weight_gradient.
      spec: the static sizes.

    Returns:
      Bytes; Triton may take up to 1 KiB more.
    """
    if pass_name == "weight_gradient":
        step, result = tile.positions * (tile.rows + tile.depth), tile.rows * tile.depth
    else:
        step, result = tile.depth * (tile.rows + tile.positions), tile.rows * tile.positions
    return max(itemsize(spec) * tile.stages * step, 4 * result)


def fits(tile: Tile, pass_name: str, spec: ConvSpec, capability: int) -> bool:
    """Whether a tile needs no more registers and shared memory than there are.

    Args:
      tile: the tile.
      pass_name: forward, input_gradient or weight_gradient.
      spec: a normal spec.
      capability: of the GPU, times ten.

    Returns:
      Whether it fits.
    """
    limit = SHARED_KIB.get(capability, 99) * 1024 - 1024
    if shared_bytes(tile, pass_name, spec) > limit or not _holds_sums(
        tile, pass_name, spec, capability
    ):
        return False
    return not _too_deep(tile, pass_name, spec, capability) and not _spills(
        tile, pass_name, spec, capability
    )


def smaller(tile: Tile, pass_name: str, spec: ConvSpec, capability: int) -> Tile:
    """Less of what does not fit: of the result, of a step, of the loads in flight.

    Args:
      tile: one that does not fit.
      pass_name, spec, capability: as for `fits`.

    Returns:
      The next tile to try.
    """
    narrower = dataclasses.replace(tile, positions=tile.positions // 2)
    shallower = dataclasses.replace(tile, depth=tile.depth // 2)
    sums = pass_name == "weight_gradient"  # its result is `rows x depth`
    if not sums and not _holds_sums(tile, pass_name, spec, capability):
        return narrower
    if _too_deep(tile, pass_name, spec, capability):
        return shallower
    if _spills(tile, pass_name, spec, capability):
        least = 32 if spec.precision == "half" else 16
        if sums or (tile.depth == least and tile.stages == 2):
            return narrower
        if tile.depth > least:
            return shallower
    return dataclasses.replace(tile, stages=tile.stages - 1) if tile.stages > 2 else shallower


def _holds_sums(tile: Tile, pass_name: str, spec: ConvSpec, capability: int) -> bool:
    """Whether the sums fit beside what else a thread holds: tensor cores before Hopper's take their
    operands from registers too.
    """
    result = tile.rows * (tile.depth if pass_name == "weight_gradient" else tile.positions)
    most = ACCUMULATORS if wide(spec, capability) else ACCUMULATORS // 2
    if capability < 90 and tile.method == "scatter":
        most //= 2  # the addresses of the sums in memory
    return result <= most * 32 * tile.warps


def _too_deep(tile: Tile, pass_name: str, spec: ConvSpec, capability: int) -> bool:
    """Whether the operands of a step, which true float32 on Ampere holds in registers, are too many
    for them.
    """
    return (
        capability < 90
        and spec.precision == "ieee"
        and pass_name != "weight_gradient"
        and tile.depth > 16
    )


def _spills(tile: Tile, pass_name: str, spec: ConvSpec, capability: int) -> bool:
    """Whether a tile is one of `SPILLING`."""
    sizes = (tile.rows, tile.positions, tile.depth, tile.stages)
    return any(
        (capability, spec.precision, pass_name, tile.method, *sizes)[: len(known)] == known
        for known in SPILLING
    )


def wide(spec: ConvSpec, capability: int) -> bool:
    """Whether the product should have 64 in front.

    Args:
      spec: a normal spec.
      capability: of the GPU, times ten.

    Returns:
      Whether Hopper's tensor cores multiply it from shared memory.
    """
    return spec.precision == "half" and capability in WIDE_TENSOR_CORES
