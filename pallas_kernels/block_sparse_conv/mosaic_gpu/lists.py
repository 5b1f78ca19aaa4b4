"""The lists of the Mosaic GPU kernels, and the weights in their order: what XLA prepares.

The contents of the index arrays are dynamic, so the lists are made in the program itself. An entry
(`geometry.entry`) names a run of source rows and an offset in pixels.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_conv.mosaic_gpu.geometry import entry
from pallas_kernels.block_sparse_conv.mosaic_gpu.tiles import Tile
from pallas_kernels.block_sparse_conv.spec import ConvSpec
from pallas_kernels.padding import pad_to, round_up


def run_length(aligned: int, tile: Tile) -> int:
    """Source rows in one entry, that is in one copy.

    Args:
      aligned: rows that lie together.
      tile: the tile.

    Returns:
      As many as are aligned and fit a stage, but 8 where several pixels share a tile.
    """
    return math.gcd(aligned, tile.depth) if tile.columns == tile.images else 8


def forward_lists(
    spec: ConvSpec, run: int, columns: int, channels: jax.Array, taps: jax.Array
) -> jax.Array:
    """The entries of each group, taps before channels.

    Args:
      spec: the static sizes.
      run: channels in one entry.
      columns: the lists are filled up to a multiple of this many rows.
      channels: int32 `[groups, kept]`.
      taps: int32 `[groups, kept_taps]`.

    Returns:
      int32 `[groups, n]`, filled up with runs past the end of the source.
    """
    y, x = _offsets(spec, taps)
    runs = channels[:, None, ::run] // run
    entries = entry(runs, y[..., None], x[..., None]).reshape(spec.groups, -1)
    length = round_up(spec.kept * spec.kept_taps, columns) // run
    past_the_end = -(-spec.cin // run)
    return pad_to(entries, (spec.groups, length), past_the_end)


class GradientLists(NamedTuple):
    """What the input gradient walks over: one list for each (phase, block of input channels).

    Attributes:
      stages: int32 `[lists]`, pipeline stages that each list fills.
      entries: int32 `[lists, n]`.
      weights: `[lists, tile.rows, n * run]`; zeros for channels that a group does not keep.
    """

    stages: jax.Array
    entries: jax.Array
    weights: jax.Array


def gradient_lists(
    spec: ConvSpec,
    tile: Tile,
    run: int,
    values: jax.Array,
    channels: jax.Array,
    taps: jax.Array,
) -> GradientLists:
    """The (group, tap) pairs that reach each block of input channels, and their weights.

    The input gradient is the forward kernel with the roles changed: a block of output rows is 64 or
    128 neighbouring input channels, and its list names the pairs that reach one of them. A group
    reaches a block or does not, so `groups * kept_taps` bounds the list statically for any
    contents. The bound costs no time: the kernel walks over the pairs that are there, which come
    first. With strides there is one list for each residue (phase) of the input pixel, of the taps
    that reach it.

    Args:
      spec: the static sizes.
      tile: the tile.
      run: rows of dy in one entry; the rows of a group lie together, filled up to a multiple of 8.
      values: packed weights.
      channels: int32 `[groups, kept]`.
      taps: int32 `[groups, kept_taps]`.

    Returns:
      The lists, phases before blocks.
    """
    group_rows = round_up(spec.group_size, 8)
    blocks = -(-spec.cin // tile.rows)
    pairs = spec.groups * spec.kept_taps
    length = round_up(pairs * group_rows, tile.depth)
    past_the_end = spec.groups * group_rows // run

    kept_at = _kept_at(spec, blocks, tile.rows, channels)
    block_is_reached = jnp.any(kept_at >= 0, axis=2)
    divisible, (y, x) = _phase_offsets(spec, taps)
    # [phase_y, phase_x, block, group, tap]
    meets = (
        divisible[0][:, None, None]
        & divisible[1][None, :, None]
        & block_is_reached.T[None, None, :, :, None]
    )
    meets = meets.reshape(-1, pairs)
    order = jnp.argsort(~meets, axis=1, stable=True)
    stages = -(-meets.sum(1) * group_rows // tile.depth)

    runs_of_group = group_rows // run
    runs = jnp.arange(spec.groups * runs_of_group, dtype=jnp.int32)
    runs = runs.reshape(spec.groups, 1, runs_of_group)
    entries = entry(runs[None, None], y[:, None, ..., None], x[None, :, ..., None])
    entries = jnp.broadcast_to(
        entries, (*spec.strides, spec.groups, spec.kept_taps, runs_of_group)
    ).reshape(-1, pairs, runs_of_group)
    entries = jnp.repeat(entries, blocks, axis=0)
    is_listed = jnp.take_along_axis(meets, order, 1)[..., None]
    entries = jnp.take_along_axis(entries, order[..., None], 1)
    entries = jnp.where(is_listed, entries, past_the_end).reshape(len(order), -1)
    entries = pad_to(entries, (len(entries), length // run), past_the_end)

    group, tap = order // spec.kept_taps, order % spec.kept_taps
    block = jnp.arange(len(order))[:, None] % blocks
    place = kept_at.swapaxes(0, 1)[block, group]  # [list, pair, row]
    # [list, row, pair, filter]
    weights = values[group[:, None], jnp.maximum(place, 0).swapaxes(1, 2), tap[:, None]]
    weights = jnp.where((is_listed & (place >= 0)).swapaxes(1, 2)[..., None], weights, 0)
    weights = pad_to(weights, (*weights.shape[:3], group_rows))
    weights = weights.reshape(len(order), tile.rows, -1)
    return GradientLists(
        stages.astype(jnp.int32),
        entries.astype(jnp.int32),
        pad_to(weights, (len(order), tile.rows, length)),
    )


def _offsets(spec: ConvSpec, taps: jax.Array) -> tuple[jax.Array, jax.Array]:
    """From an output pixel (times the stride) to what a tap reads, in pixels: `(y, x)`."""
    tap_y, tap_x = taps // spec.kernel[1], taps % spec.kernel[1]
    return (
        tap_y * spec.dilation[0] - spec.padding[0][0],
        tap_x * spec.dilation[1] - spec.padding[1][0],
    )


def _phase_offsets(
    spec: ConvSpec, taps: jax.Array
) -> tuple[list[jax.Array], tuple[jax.Array, jax.Array]]:
    """Which phases of the input pixels each tap reaches, and from where.

    Returns, along each axis: whether a tap reaches a phase, and the offset in pixels of dy to what
    it reads (0 where it does not), both `[phases, groups, kept_taps]`.
    """
    divisible, offsets = [], []
    for stride, offset in zip(spec.strides, _offsets(spec, taps), strict=True):
        distance = jnp.arange(stride, dtype=jnp.int32)[:, None, None] - offset[None]
        reaches = distance % stride == 0
        divisible.append(reaches)
        offsets.append(jnp.where(reaches, distance // stride, 0))
    return divisible, (offsets[0], offsets[1])


def _kept_at(spec: ConvSpec, blocks: int, rows: int, channels: jax.Array) -> jax.Array:
    """Where each channel stands in a group's list of kept channels: `[groups, blocks, rows]`.

    A channel that the group does not keep has -1.
    """
    group = jnp.arange(spec.groups)[:, None]
    nowhere = jnp.full((spec.groups, blocks * rows), -1, jnp.int32)
    place = nowhere.at[group, channels].set(jnp.arange(spec.kept, dtype=jnp.int32))
    return place.reshape(spec.groups, blocks, rows)
