"""Calls of the Triton kernels: their lists, compile-time arguments and grids."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_conv.epilogue import Epilogue
from pallas_kernels.block_sparse_conv.spec import ConvSpec
from pallas_kernels.block_sparse_conv.triton import foreign, kernels
from pallas_kernels.block_sparse_conv.triton.fitting import Tile
from pallas_kernels.block_sparse_conv.triton.foreign import Launch
from pallas_kernels.devices import DEFAULT
from pallas_kernels.padding import pad_to, round_up

NOTHING = -1
"""Stands in a list for no row, and among the rows of a result for no place."""


class Weights(NamedTuple):
    """The weights of `gather_product`.

    Attributes:
      array: the weights.
      strides: of (group, k, m): where `[group, k, m]` lies in the flat array.
      depth: k, the length of each group's contraction.
      members: m, the rows of each group's result.
    """

    array: jax.Array
    strides: tuple[int, int, int]
    depth: int
    members: int


def capability() -> int:
    """The GPU's compute capability times ten.

    Returns:
      The capability; without a GPU that of `devices.DEFAULT`, to compile for.
    """
    version = getattr(jax.devices()[0], "compute_capability", None)
    if version is None:
        return DEFAULT.capability
    digits = str(version).replace(".", "")
    return int(digits) if digits.isdigit() else 0


def run(launch: Launch, *operands: jax.Array) -> jax.Array:
    """Calls a kernel; tests replace this function by an interpreter or a recorder.

    Args:
      launch: the call.
      *operands: the kernel's arrays.

    Returns:
      The result.
    """
    return foreign.call(launch, capability(), *operands)


def pad_last(array: jax.Array, size: int) -> jax.Array:
    """Appends `NOTHING` along the last axis.

    Args:
      array: a list of entries or rows.
      size: of the last axis of the result.

    Returns:
      The padded array.
    """
    return pad_to(array, (*array.shape[:-1], size), NOTHING)


def entries(
    spec: ConvSpec, channels: jax.Array, taps: jax.Array, *, taps_first: bool, depth: int
) -> jax.Array:
    """The kernels' lists of the rows (channel, tap) that each group contracts over.

    Args:
      spec: the static sizes.
      channels: int32 `[groups, n]`, channels of what is gathered.
      taps: int32 `[groups, kept_taps]`.
      taps_first: whether the taps vary slowest.
      depth: length of each list.

    Returns:
      int32 `[groups, depth]`, filled up with `NOTHING`.
    """
    bits = kernels.TAP_BITS
    channel_bits = channels << 2 * bits
    tap_bits = taps // spec.kernel[1] << bits | taps % spec.kernel[1]
    if taps_first:
        rows = channel_bits[:, None, :] | tap_bits[:, :, None]
    else:
        rows = channel_bits[:, :, None] | tap_bits[:, None, :]
    return pad_last(rows.reshape(rows.shape[0], -1), depth)


def geometry_constants(spec: ConvSpec, backward: bool) -> dict[str, Any]:
    """The compile-time arguments that say how positions lie.

    Args:
      spec: a normal spec.
      backward: from dy to dx.

    Returns:
      The arguments by name. "border": a tap may fall outside the image. "wide": offsets need 64
      bits.
    """
    source = spec.out_shape if backward else spec.in_shape
    out = spec.in_shape if backward else spec.out_shape
    low = (spec.padding[0][0], spec.padding[1][0])
    border = False
    for axis in (0, 1):
        size = out[1 + axis]
        reach = spec.reach[axis]
        if backward:
            first, last = low[axis] - reach, size - 1 + low[axis]
        else:
            first, last = -low[axis], (size - 1) * spec.strides[axis] + reach - low[axis]
        border |= first < 0 or last >= source[1 + axis]
    largest = max(math.prod(spec.in_shape[:3]), math.prod(spec.out_shape[:3])) * spec.batch
    return {
        "size": source[1:],
        "out_size": out[1:],
        "strides": spec.strides,
        "padding": low,
        "dilation": spec.dilation,
        "border": border,
        "wide": largest >= 1 << 31,
        "precision": "tf32" if spec.precision == "tf32" else "ieee",
    }


def gather_product(
    spec: ConvSpec,
    tile: Tile,
    source: jax.Array,
    lists: jax.Array,
    weights: Weights,
    rows: jax.Array,
    *,
    backward: bool,
    dtype: Any,
    bounds: jax.Array | None = None,
    epilogue: Epilogue | None = None,
    relu: bool = False,
    scatter: bool = False,
) -> jax.Array:
    """Runs the kernel `gather_product` over all groups.

    Args:
      spec: a normal spec.
      tile: the tile.
      source: activations that are gathered.
      lists: their rows, as `entries` gives them.
      weights: the weights of each group.
      rows: int32 `[groups, members]`, where each group's results go.
      backward: from dy to dx.
      dtype: of the result.
      bounds: where each group's entries begin in a table; None: every group has a list of its own.
      epilogue: what is applied to the result.
      relu: whether negative results become 0.
      scatter: whether the results are added to float32 sums in memory.

    Returns:
      Activations in the shape of dx or of y.
    """
    epilogue = Epilogue() if epilogue is None else epilogue
    groups = rows.shape[0]
    row_tiles = -(-weights.members // tile.rows)
    shape = spec.in_shape if backward else spec.out_shape
    position_tiles = -(-math.prod(shape[1:]) // tile.positions)
    rows = pad_last(rows, row_tiles * tile.rows)
    constants = geometry_constants(spec, backward) | {
        "groups": groups,
        "depth": weights.depth,
        "depth_padded": round_up(weights.depth, tile.depth),
        "members": weights.members,
        "weight_strides": weights.strides,
        "backward": backward,
        "ragged": weights.depth % tile.depth != 0,
        "table": bounds is not None,
        "scatter": scatter,
        "with_scale": epilogue.scale is not None,
        "with_bias": epilogue.bias is not None,
        "with_residual": epilogue.residual is not None,
        "relu": relu,
        "block_rows": tile.rows,
        "block_positions": tile.positions,
        "block_depth": tile.depth,
        "positions_first": tile.positions_first,
    }
    launch = Launch(
        "gather_product",
        programs=groups * row_tiles * position_tiles,
        constants=tuple(constants.items()),
        tile=tile,
        out=jax.ShapeDtypeStruct(shape, dtype),
        zeroed=scatter,
    )
    unused = rows  # the kernel does not read an operand that is absent, but takes one
    operands = (source, lists, weights.array, bounds, rows, *epilogue)
    return run(launch, *(unused if operand is None else operand for operand in operands))


def weight_gradient(
    spec: ConvSpec,
    tile: Tile,
    x: jax.Array,
    dy: jax.Array,
    lists: jax.Array,
    filters: jax.Array,
) -> jax.Array:
    """Runs the kernel `weight_gradient` over all groups.

    Args:
      spec: a normal spec.
      tile: the tile.
      x, dy: activations in the normal shapes.
      lists: the gathered rows of x, as `entries` gives them.
      filters: int32 `[groups, group_size]`, the rows of dy.

    Returns:
      float32 partial sums `[splits, groups, kept, kept_taps, group_size]`.
    """
    depth, members = spec.kept * spec.kept_taps, spec.group_size
    padded_depth = round_up(depth, tile.depth)
    row_tiles = -(-members // tile.rows)
    constants = geometry_constants(spec, backward=False) | {
        "groups": spec.groups,
        "depth": depth,
        "depth_padded": padded_depth,
        "members": members,
        "splits": tile.splits,
        "ragged": depth % tile.depth != 0,
        "block_rows": tile.rows,
        "block_depth": tile.depth,
        "block_positions": tile.positions,
    }
    launch = Launch(
        "weight_gradient",
        programs=spec.groups * row_tiles * (padded_depth // tile.depth) * tile.splits,
        constants=tuple(constants.items()),
        tile=tile,
        out=jax.ShapeDtypeStruct((tile.splits, *spec.packed_shape), jnp.float32),
    )
    rows = pad_last(filters, row_tiles * tile.rows)
    return run(launch, x, lists, rows, dy)
