"""The plan of a convolution: the lists that GPU kernels read, made when the masks change.

They depend on the masks alone: not on the batch, the image, the strides, the padding or the
dilation. Their shapes follow from those of the packed values, so new masks do not recompile.

The input gradient reads a *table*. It cuts the input channels into *blocks* of up to 64, and a
block's contraction into *stages*: a stage holds one tap and up to 64 filters of one group that
keeps channels of the block. The stages of a block are in the order of their tap's *parity*, `2 * (y
% 2) + x % 2`: with strides of 2 a pixel takes the stages of one parity alone.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.block_sparse_conv.index import Index
from pallas_kernels.padding import pad_to, round_up

NOTHING = -1
"""Stands in a list for no row, and among the rows of a result for no place."""
TAP_BITS = 4
"""Bits of each coordinate of a tap in an entry."""
MAX_KERNEL = 1 << TAP_BITS
MAX_CHANNELS = 1 << (31 - 2 * TAP_BITS)
LIST_MULTIPLE = 128
"""Lists are filled up to a multiple of this: every tile divides it."""
LARGEST_BLOCK = 64
"""The most channels of a block, and the most filters of a stage."""
PARITIES = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The lists of one convolution, all int32; a pytree.

    An entry of a list is one row of activations, `channel << 8 | tap_y << 4 | tap_x`; -1 is none.

    Attributes:
      forward: `[groups, length]`, the rows of x that each group contracts over, in the order of the
        packed values; the weight gradient's rows too.
      rows: `[groups, length]`, the filters of each group, filled up with -1.
      entries: `[(stages + 1) * depth]`, the rows of dy of every stage of the table. The kernels
        read one stage ahead, so both lists end in one that is empty.
      weights: `[stages + 1, runs]`, for each run of channels of the stage's block where its weights
        lie in the packed values, `((group * kept + first kept channel) * kept_taps + tap) * parts +
        part`, where a stage holds one of `parts` parts of the group's filters; -1: not kept.
      bounds: `[blocks * 4 + 1]`, the first stage of each parity of each block.

    Example:
      >>> index = Index(jnp.array([[0, 2], [1, 3]]), jnp.array([[0], [2]]), jnp.array([[4], [0]]))
      >>> plan: Plan = make_plan(index, kernel_shape=(3, 3, 4, 4))
      >>> plan.forward[:, 0].tolist(), plan.rows[:, :3].tolist()
      ([17, 512], [[0, 2, -1], [1, 3, -1]])
    """

    forward: jax.Array
    rows: jax.Array
    entries: jax.Array
    weights: jax.Array
    bounds: jax.Array


class PlanSizes(NamedTuple):
    """The static sizes of a plan.

    Attributes:
      depth: filters of a stage, 16, 32 or 64.
      parts: stages for one tap of a group.
      block: channels of a block, 16, 32 or 64.
      run: channels that are kept together and lie together.
      blocks: how many blocks there are.
      stages: the most stages that masks can need.
      shapes: of the arrays, by name.
    """

    depth: int
    parts: int
    block: int
    run: int
    blocks: int
    stages: int
    shapes: dict[str, tuple[int, ...]]


def plan_sizes(
    kernel_shape: tuple[int, ...], packed_shape: tuple[int, ...], channel_block: int
) -> PlanSizes:
    """The static sizes of a plan.

    Args:
      kernel_shape: `(kh, kw, cin, cout)`.
      packed_shape: `(groups, kept, kept_taps, group_size)`.
      channel_block: channels come in aligned runs of this many.

    Returns:
      The sizes.

    Example:
      >>> sizes = plan_sizes((3, 3, 256, 256), (4, 80, 3, 64), channel_block=16)
      >>> sizes.blocks, sizes.stages, sizes.shapes["weights"]
      (4, 48, (49, 4))
    """
    groups, kept, kept_taps, group_size = packed_shape
    cin = kernel_shape[2]
    depth, block = _power_of_two(group_size), _power_of_two(cin)
    parts, run = -(-group_size // depth), math.gcd(channel_block, block)
    blocks = -(-cin // block)
    stages = groups * min(blocks, kept // run) * kept_taps * parts
    shapes = {
        "forward": (groups, round_up(kept * kept_taps, LIST_MULTIPLE)),
        "rows": (groups, round_up(group_size, LIST_MULTIPLE)),
        "entries": ((stages + 1) * depth,),
        "weights": (stages + 1, block // run),
        "bounds": (blocks * PARITIES + 1,),
    }
    return PlanSizes(depth, parts, block, run, blocks, stages, shapes)


def why_no_plan(kernel_shape: tuple[int, ...]) -> str | None:
    """Why a conv kernel cannot have a plan.

    Args:
      kernel_shape: `(kh, kw, cin, cout)`.

    Returns:
      None where it can, else the reason.

    Example:
      >>> why_no_plan((17, 1, 8, 8))
      'takes kernels up to 16 pixels on a side, got (17, 1)'
    """
    if max(kernel_shape[:2]) > MAX_KERNEL:
        return f"takes kernels up to {MAX_KERNEL} pixels on a side, got {tuple(kernel_shape[:2])}"
    if (channels := max(kernel_shape[2:])) > MAX_CHANNELS:
        return f"takes up to {MAX_CHANNELS} channels, got {channels}"
    return None


def make_plan(index: Index, *, kernel_shape: tuple[int, ...], channel_block: int = 1) -> Plan:
    """Makes the plan of a convolution; jit it, and call it when the masks change.

    Args:
      index: filters, channels and taps; may be traced.
      kernel_shape: `(kh, kw, cin, cout)` of the conv kernel.
      channel_block: channels come in aligned runs of this many.

    Returns:
      The plan.

    Raises:
      ValueError: the kernel is too large (see `why_no_plan`).

    Example:
      >>> index = Index(jnp.array([[0, 2], [1, 3]]), jnp.array([[0], [2]]), jnp.array([[4], [0]]))
      >>> make_plan(index, kernel_shape=(3, 3, 4, 4)).bounds.tolist()
      [0, 1, 1, 1, 2]
    """
    if reason := why_no_plan(kernel_shape):
        raise ValueError(f"kernel_shape: a plan {reason}")
    index = Index(*(jnp.asarray(array, jnp.int32) for array in index))
    groups, group_size = index.filters.shape
    packed_shape = (groups, index.channels.shape[1], index.taps.shape[1], group_size)
    sizes = plan_sizes(kernel_shape, packed_shape, channel_block)
    forward = list_entries(index.channels[:, :, None], index.taps[:, None, :], kernel_shape[1])
    forward = forward.reshape(groups, -1)
    entries, weights, bounds = _table(index, sizes, kernel_shape[1])
    return Plan(
        forward=pad_to(forward, sizes.shapes["forward"], NOTHING),
        rows=pad_to(index.filters, sizes.shapes["rows"], NOTHING),
        entries=entries,
        weights=weights,
        bounds=bounds,
    )


def list_entries(channels: jax.Array, taps: jax.Array, kernel_width: int) -> jax.Array:
    """The entries of rows (channel, tap).

    Args:
      channels: int32, of what is gathered.
      taps: int32 `y * kw + x`, in a shape that broadcasts with that of the channels.
      kernel_width: kw.

    Returns:
      int32.

    Example:
      >>> list_entries(jnp.array([3]), jnp.array([4]), 3).tolist()
      [785]
    """
    tap_bits = taps // kernel_width << TAP_BITS | taps % kernel_width
    return channels << 2 * TAP_BITS | tap_bits


def check_plan(
    plan: Plan, kernel_shape: tuple[int, ...], packed_shape: tuple[int, ...], channel_block: int
) -> None:
    """Checks a plan against the convolution that it is given to.

    Args:
      plan: its arrays may be traced: their contents are not checked.
      kernel_shape, packed_shape, channel_block: as in `plan_sizes`.

    Raises:
      ValueError: it is no plan, or one of another layout; the message names the array.

    Example:
      >>> index = Index(jnp.array([[0, 2], [1, 3]]), jnp.array([[0], [2]]), jnp.array([[4], [0]]))
      >>> check_plan(make_plan(index, kernel_shape=(3, 3, 4, 4)), (3, 3, 4, 4), (2, 1, 1, 2), 1)
    """
    if not isinstance(plan, Plan):
        raise ValueError(f"plan: expected a Plan or None, got {type(plan).__name__}")
    for name, shape in plan_sizes(kernel_shape, packed_shape, channel_block).shapes.items():
        array = getattr(plan, name)
        if tuple(array.shape) != shape or array.dtype != jnp.int32:
            raise ValueError(
                f"plan.{name}: expected int32{list(shape)} for the kernel {tuple(kernel_shape)}, "
                f"packed values {tuple(packed_shape)} and channel_block={channel_block}, got "
                f"{array.dtype}{list(array.shape)}; make the plan from this kernel's layout"
            )


def _power_of_two(size: int) -> int:
    """The power of two that holds a size, within 16 to `LARGEST_BLOCK`."""
    return min(LARGEST_BLOCK, max(16, 1 << (size - 1).bit_length()))


def _table(
    index: Index, sizes: PlanSizes, kernel_width: int
) -> tuple[Int[Array, " e"], Int[Array, "s r"], Int[Array, " b"]]:
    """The table of the input gradient: entries, weights and bounds."""
    groups, kept = index.channels.shape
    kept_taps = index.taps.shape[1]
    runs = sizes.block // sizes.run
    group = jnp.arange(groups, dtype=jnp.int32)
    # kept_run[g, b, r]: which of group g's kept runs is run r of block b
    kept_runs = jnp.arange(kept // sizes.run, dtype=jnp.int32)
    kept_run = jnp.full((groups, sizes.blocks * runs), NOTHING, jnp.int32)
    first = index.channels[:, :: sizes.run] // sizes.run
    kept_run = kept_run.at[group[:, None], first].set(kept_runs)
    kept_run = kept_run.reshape(groups, sizes.blocks, runs)
    is_kept = (kept_run >= 0).any(2)

    parity = index.taps // kernel_width % 2 * 2 + index.taps % kernel_width % 2
    segment = jnp.arange(sizes.blocks)[None, :, None] * PARITIES + parity[:, None, :]
    last = sizes.blocks * PARITIES  # of what is not kept
    segment = jnp.where(is_kept[:, :, None], segment, last).astype(jnp.int32)
    count = sizes.stages // sizes.parts
    order = jnp.argsort(segment.reshape(-1), stable=True)[:count]
    of_group, of_block, of_tap = jnp.unravel_index(order, segment.shape)
    sorted_segment = segment.reshape(-1)[order]
    is_stage = sorted_segment < last
    # Compared at once: a search would loop, and a loop in a step cannot go into its CUDA graph.
    firsts = jnp.searchsorted(sorted_segment, jnp.arange(last + 1), method="compare_all")
    bounds = firsts * sizes.parts

    filters = pad_to(index.filters, (groups, sizes.parts * sizes.depth), NOTHING)[of_group]
    entries = list_entries(filters, index.taps[of_group, of_tap][:, None], kernel_width)
    entries = jnp.where(is_stage[:, None] & (filters >= 0), entries, NOTHING).reshape(-1)
    run = kept_run[of_group, of_block]
    channel = of_group[:, None] * kept + run * sizes.run
    slice_of_run = channel * kept_taps + of_tap[:, None]
    part = jnp.arange(sizes.parts)[None, :, None]
    weights = slice_of_run[:, None, :] * sizes.parts + part
    weights = jnp.where((is_stage[:, None] & (run >= 0))[:, None, :], weights, NOTHING)
    return (
        pad_to(entries, sizes.shapes["entries"], NOTHING).astype(jnp.int32),
        pad_to(weights.reshape(-1, runs), sizes.shapes["weights"], NOTHING).astype(jnp.int32),
        bounds.astype(jnp.int32),
    )
