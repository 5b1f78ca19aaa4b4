"""Calls of the Triton kernels: their lists, compile-time arguments and grids."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.batch_norm import Affine
from pallas_kernels.block_sparse_conv.epilogue import Epilogue
from pallas_kernels.block_sparse_conv.index import Index
from pallas_kernels.block_sparse_conv.plan import (
    LIST_MULTIPLE,
    NOTHING,
    Plan,
    make_plan,
    plan_sizes,
)
from pallas_kernels.block_sparse_conv.spec import ConvSpec
from pallas_kernels.block_sparse_conv.triton import foreign
from pallas_kernels.block_sparse_conv.triton.fitting import Tile
from pallas_kernels.block_sparse_conv.triton.foreign import Launch
from pallas_kernels.devices import DEFAULT
from pallas_kernels.padding import pad_to, round_up


class Lists(NamedTuple):
    """What `gather_product` contracts over, group by group.

    Attributes:
      entries: int32 `[groups, length]`, the rows of each group.
      rows: int32 `[groups, length]`, where each group's results go.
      weights: the weights.
      strides: of (group, k, m): where the weight `[group, k, m]` lies in the flat array.
      depth: k, the length of each group's contraction.
      members: m, the rows of each group's result.
    """

    entries: jax.Array
    rows: jax.Array
    weights: jax.Array
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


class ThroughNorm(NamedTuple):
    """The arrays of `norm_input_gradient`, in the shapes of a normal spec.

    Attributes:
      z: the activations that were normalised.
      scale, shift: of each channel.
      joined: the convolution's input, where a shortcut was added, else None.
      more: another gradient with respect to the input, or None.
    """

    z: jax.Array
    scale: jax.Array
    shift: jax.Array
    joined: jax.Array | None
    more: jax.Array | None


def run(launch: Launch, *operands: jax.Array) -> Any:
    """Calls a kernel; tests replace this function by an interpreter or a recorder.

    Args:
      launch: the call.
      *operands: the kernel's arrays.

    Returns:
      The result, or a tuple of the results.
    """
    return foreign.call(launch, capability(), *operands)


def pad_list(array: jax.Array) -> jax.Array:
    """Appends `NOTHING` along the last axis, to a multiple of every tile.

    Args:
      array: a list of entries or rows.

    Returns:
      The padded array.
    """
    size = round_up(array.shape[-1], LIST_MULTIPLE)
    return pad_to(array, (*array.shape[:-1], size), NOTHING)


def plan_of(spec: ConvSpec, index: Index) -> Plan:
    """The plan of a convolution that was given none, made in the step.

    Args:
      spec: the static sizes.
      index: filters, channels and taps.

    Returns:
      The plan; under jit what a pass does not read is not computed.
    """
    return make_plan(index, kernel_shape=spec.kernel_shape, channel_block=spec.channel_block)


def has_phases(spec: ConvSpec) -> bool:
    """Whether a table's programs may work on the pixels of one phase each.

    A table is in the order of the taps' parities. They tell which taps reach a pixel where strides
    are 2 and dilations odd; without strides every tap does.

    Args:
      spec: the static sizes.

    Returns:
      A bool; where it is False each program tests every tap.
    """
    is_odd = spec.dilation[0] % 2 == 1 and spec.dilation[1] % 2 == 1
    return spec.strides == (1, 1) or (spec.strides == (2, 2) and is_odd)


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
            first, last = low[axis] - reach, (size - 1 + low[axis]) // spec.strides[axis]
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
    lists: Lists,
    *,
    backward: bool,
    dtype: Any,
    epilogue: Epilogue | None = None,
    relu: bool = False,
    scatter: bool = False,
    with_sums: bool = False,
    norm: Affine | None = None,
) -> Any:
    """Runs the kernel `gather_product` over all groups.

    Args:
      spec: a normal spec.
      tile: the tile.
      source: activations that are gathered.
      lists: what each group contracts.
      backward: from dy to dx.
      dtype: of the result.
      epilogue: what is applied to the result.
      relu: whether negative results become 0.
      scatter: whether the results are added to float32 sums in memory.
      with_sums: whether the result is summed over each channel.
      norm: normalises the activations while they are gathered, then `relu` is of them; without
        another epilogue.

    Returns:
      Activations in the shape of dx or of y; with `with_sums` also float32 `[2, channels]`.
    """
    groups = lists.rows.shape[0]
    out = jax.ShapeDtypeStruct(spec.in_shape if backward else spec.out_shape, dtype)
    constants = {
        "groups": groups,
        "depth": lists.depth,
        "list_length": lists.entries.shape[1],
        "members": lists.members,
        "row_length": lists.rows.shape[1],
        "weight_strides": lists.strides,
        "ragged": lists.depth % tile.depth != 0,
        "table": False,
        "by_phase": False,
        "stage_depth": tile.depth,
        "parts": 1,
        "run": 1,
        "scatter": scatter,
        "normalise": norm is not None,
        "relu": relu,
    }
    epilogue = Epilogue() if epilogue is None else epilogue
    if norm is not None:
        epilogue = Epilogue(*norm)
    lists_of_kernel = (lists.entries, lists.weights, None, None, lists.rows)
    operands = (source, *lists_of_kernel, *epilogue, None, None)
    positions = math.prod(out.shape[1:])
    return _run_product(
        spec, tile, operands, constants, out, positions, backward=backward, with_sums=with_sums
    )


def table_product(
    spec: ConvSpec,
    tile: Tile,
    dy: jax.Array,
    values: jax.Array,
    plan: Plan,
    norm: ThroughNorm | None = None,
    relu: bool = False,
) -> Any:
    """Runs the kernel `gather_product` over a plan's table: the input gradient.

    Args:
      spec: a normal spec.
      tile: the tile; its rows divide the plan's blocks, its depth the plan's stages.
      dy: the gradient with respect to y.
      values: packed weights, which are read where they lie.
      plan: the lists.
      norm: of the convolution's input, to go on through it.
      relu: whether the norm ends in a ReLU.

    Returns:
      dx; with a norm dz, float32 sums `[2, cin]` and, where it is joined, g.

    Raises:
      ValueError: the tile does not divide the blocks and stages.
    """
    sizes = plan_sizes(spec.kernel_shape, spec.packed_shape, spec.channel_block)
    if sizes.block % tile.rows or sizes.depth % tile.depth:
        raise ValueError(
            f"tile: its rows must divide the plan's blocks of {sizes.block} channels and its depth "
            f"the stages of {sizes.depth} filters, got {tile.rows} and {tile.depth}"
        )
    by_phase = has_phases(spec)
    phases = spec.strides if by_phase else (1, 1)
    height, width = (-(-size // step) for size, step in zip(spec.in_size, phases))
    constants = {
        "groups": sizes.blocks,
        "depth": spec.group_size,
        "list_length": 0,
        "members": sizes.block,
        "row_length": 0,
        "weight_strides": (0, 1, spec.kept_taps * spec.group_size),
        "ragged": spec.group_size % sizes.depth != 0,
        "table": True,
        "by_phase": by_phase,
        "stage_depth": sizes.depth,
        "parts": sizes.parts,
        "run": sizes.run,
        "scatter": False,
        "normalise": False,
        "relu": relu,
    }
    epilogue: tuple[Any, ...] = (*Epilogue(), None, None)
    if norm is not None:
        epilogue = (norm.scale, norm.shift, norm.more, norm.z, norm.joined)
    operands = (dy, plan.entries, values, plan.bounds, plan.weights, None, *epilogue)
    out = jax.ShapeDtypeStruct(spec.in_shape, dy.dtype)
    positions = height * width * spec.batch
    return _run_product(
        spec,
        tile,
        operands,
        constants,
        out,
        positions,
        backward=True,
        phases=math.prod(phases),
        with_sums=norm is not None,
    )


def _run_product(
    spec: ConvSpec,
    tile: Tile,
    operands: tuple[Any, ...],
    constants: dict[str, Any],
    out: jax.ShapeDtypeStruct,
    positions: int,
    *,
    backward: bool,
    phases: int = 1,
    with_sums: bool = False,
) -> Any:
    """Launches `gather_product`: a program for each group, tile of rows, positions and phase."""
    row_tiles = -(-constants["members"] // tile.rows)
    tiles = -(-positions // tile.positions) * phases
    scale, bias, residual, normed, joined = operands[-5:]
    outs = [out]
    if with_sums:
        outs.append(jax.ShapeDtypeStruct((2, out.shape[0], tiles), jnp.float32))
    if joined is not None:
        outs.append(out)
    # The kernel does not read what is absent. It takes an array in its place among its operands,
    # and a number in its place among its results.
    absent = dict.fromkeys(("sums", "shortcut_gradient")[len(outs) - 1 :], 0)
    constants |= geometry_constants(spec, backward) | {
        "channels": out.shape[0],
        "backward": backward,
        "with_scale": scale is not None and not constants["normalise"],
        "with_bias": bias is not None and not constants["normalise"],
        "with_residual": residual is not None,
        "with_norm": normed is not None,
        "with_joined": joined is not None,
        "with_sums": with_sums,
        "block_rows": tile.rows,
        "block_positions": tile.positions,
        "block_depth": tile.depth,
        "positions_first": tile.positions_first,
    }
    launch = Launch(
        "gather_product",
        programs=constants["groups"] * row_tiles * tiles,
        constants=tuple((constants | absent).items()),
        tile=tile,
        out=tuple(outs) if with_sums else out,
        zeroed=constants["scatter"],
    )
    unused = operands[1]
    results = run(launch, *(unused if operand is None else operand for operand in operands))
    if not with_sums:
        return results
    result, partial_sums, *gradient = results
    return result, partial_sums.sum(2), *gradient


def stationary_product(
    spec: ConvSpec,
    tile: Tile,
    x: jax.Array,
    values: jax.Array,
    plan: Plan,
    *,
    epilogue: Epilogue,
    relu: bool = False,
    with_sums: bool = False,
    norm: Affine | None = None,
) -> Any:
    """Runs the kernel `stationary_product` over all groups: the forward pass.

    Args:
      spec: a normal spec.
      tile: the tile; its depth holds all rows of a group.
      x: activations.
      values: packed weights.
      plan: the lists.
      epilogue, relu, with_sums, norm: as for `gather_product`.

    Returns:
      y; with `with_sums` also float32 `[2, cout]`.

    Raises:
      ValueError: the tile is less deep than a group's contraction.
    """
    depth, members = spec.kept * spec.kept_taps, spec.group_size
    if tile.depth < depth:
        raise ValueError(
            f"tile: with walkers its depth must be a group's whole contraction, {depth} or more, "
            f"got {tile.depth}"
        )
    scale, bias, residual = Epilogue(*norm) if norm is not None else epilogue
    out = jax.ShapeDtypeStruct(spec.out_shape, x.dtype)
    sums = jax.ShapeDtypeStruct((2, spec.cout, tile.walkers), jnp.float32)
    constants = geometry_constants(spec, backward=False) | {
        "groups": spec.groups,
        "depth": depth,
        "list_length": plan.forward.shape[1],
        "members": members,
        "channels": spec.cout,
        "row_length": plan.rows.shape[1],
        "ragged": depth != tile.depth,
        "with_scale": norm is None and scale is not None,
        "with_bias": norm is None and bias is not None,
        "with_residual": residual is not None,
        "with_sums": with_sums,
        "normalise": norm is not None,
        "relu": relu,
        "block_rows": tile.rows,
        "block_positions": tile.positions,
        "block_depth": tile.depth,
        "positions_first": tile.positions_first,
        "walkers": tile.walkers,
    }
    launch = Launch(
        "stationary_product",
        programs=spec.groups * -(-members // tile.rows) * tile.walkers,
        constants=tuple((constants | ({} if with_sums else {"sums": 0})).items()),
        tile=tile,
        out=(out, sums) if with_sums else out,
    )
    operands = (x, plan.forward, values, plan.rows, scale, bias, residual)
    results = run(launch, *(plan.forward if one is None else one for one in operands))
    if not with_sums:
        return results
    y, partial_sums = results
    return y, partial_sums.sum(2)


def weight_gradient(
    spec: ConvSpec,
    tile: Tile,
    x: jax.Array,
    dy: jax.Array,
    plan: Plan,
    norm: Affine | None = None,
    relu: bool = False,
) -> jax.Array:
    """Runs the kernel `weight_gradient` over all groups.

    Args:
      spec: a normal spec.
      tile: the tile.
      x, dy: activations in the normal shapes.
      plan: the lists.
      norm: normalises x while it is gathered.
      relu: whether the norm ends in a ReLU.

    Returns:
      float32 partial sums `[splits, groups, kept, kept_taps, group_size]`.
    """
    depth, members = spec.kept * spec.kept_taps, spec.group_size
    row_tiles, depth_tiles = -(-members // tile.rows), -(-depth // tile.depth)
    constants = geometry_constants(spec, backward=False) | {
        "groups": spec.groups,
        "depth": depth,
        "list_length": plan.forward.shape[1],
        "members": members,
        "row_length": plan.rows.shape[1],
        "splits": tile.splits,
        "ragged": depth % tile.depth != 0,
        "normalise": norm is not None,
        "relu": relu,
        "block_rows": tile.rows,
        "block_depth": tile.depth,
        "block_positions": tile.positions,
    }
    launch = Launch(
        "weight_gradient",
        programs=spec.groups * row_tiles * depth_tiles * tile.splits,
        constants=tuple(constants.items()),
        tile=tile,
        out=jax.ShapeDtypeStruct((tile.splits, *spec.packed_shape), jnp.float32),
    )
    of_norm = norm or (plan.forward, plan.forward)  # not read without a norm
    return run(launch, x, plan.forward, plan.rows, dy, *of_norm)
