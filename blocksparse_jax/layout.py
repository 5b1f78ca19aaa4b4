"""BlockLayout: the index arrays that say which weights of a conv kernel are kept.

A layout partitions the filters (output channels) of a conv kernel into groups of equal size. All
filters of a group keep the same input channels and, at those, the same taps, so a group is one
dense block. Every array has a static shape: new masks never recompile.
"""

import dataclasses
import functools
import math
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from blocksparse_jax import _checks
from blocksparse_jax.kernels import Kernels, kernels
from pallas_kernels.block_sparse_conv.index import Index
from pallas_kernels.block_sparse_conv.plan import Plan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BlockLayout:
    """The kept blocks of one conv kernel `[kh, kw, cin, cout]`; a pytree of index arrays.

    The layout of a dense kernel `[cin, cout]` is that of a 1x1 convolution. The layouts of stacked
    kernels (`nn.scan`) are stacked alike: every array has their leading axes in front, and
    `lax.scan` or `vmap` over it gives the layout of one kernel.

    Layouts compare by identity, since `==` on arrays gives one answer for each element. To compare
    two patterns, compare their `layout_to_mask`.

    Attributes:
      filters: int32 `[groups, group_size]`, a partition of `range(cout)`.
      channels: int32 `[groups, kept]`, the input channels that each group keeps, ascending, without
        repeats.
      taps: int32 `[groups, kept_taps]`, the kernel positions `y * kw + x` that each group keeps,
        ascending, without repeats.
      shape: `(kh, kw, cin, cout)` of the conv kernel, or `(cin, cout)` of a dense kernel; of one
        kernel of a stack (static).
      channel_block: channels come in aligned runs of this many (static).
      plan: the lists of GPU kernels, made from the other arrays by `with_plans`, stacked alike;
        None: a step makes them.

    Example:
      >>> filters, channels, taps = ([[0, 2], [1, 3]], [[0], [2]], [[4], [0]])
      >>> layout = BlockLayout(*map(jnp.array, (filters, channels, taps)), shape=(3, 3, 4, 4))
      >>> layout.packed_shape, layout.density
      ((2, 1, 1, 2), 0.027777777777777776)

    Reference: the block of Ma et al., "HRBP", CPAL 2024.
    """

    filters: jax.Array  # int32[groups, group_size]
    channels: jax.Array  # int32[groups, kept]
    taps: jax.Array  # int32[groups, kept_taps]
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    channel_block: int = dataclasses.field(default=1, metadata={"static": True})
    plan: Plan | None = None

    @property
    def kernels(self) -> Kernels:
        """The kernels that the layout is of: the leading axes of a stack, and the shape of one."""
        return Kernels(tuple(self.filters.shape[:-2]), self.shape)

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Shape of the parameter: that of a kernel, behind the leading axes of a stack."""
        return *self.kernels.stack, *self.shape

    @property
    def full_packed_shape(self) -> tuple[int, ...]:
        """Shape of its packed values, behind the leading axes of a stack."""
        return *self.kernels.stack, *self.packed_shape

    @property
    def packed_shape(self) -> tuple[int, int, int, int]:
        """Shape of a kernel's packed values: `(groups, kept, kept_taps, group_size)`."""
        return (
            self.filters.shape[-2],
            self.channels.shape[-1],
            self.taps.shape[-1],
            self.filters.shape[-1],
        )

    @property
    def density(self) -> float:
        """Fraction of the conv kernel's weights that are kept."""
        return math.prod(self.packed_shape) / math.prod(self.shape)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Dense:
    """The layout of a leaf that stays dense: a marker without arrays.

    Example:
      >>> jax.tree.leaves({"bias": Dense()})
      []
    """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConsecutiveGroups:
    """The layout of a leaf in groups of consecutive filters whose kept count changes in training.

    The kept count is a shape, so it is read from the mask outside of jit: `get_layouts` turns this
    marker into a `BlockLayout`.

    Attributes:
      group_size: filters in a group (static).
      packed: in the state of packed values, their layout: there is no mask to read it from.

    Example:
      >>> ConsecutiveGroups(16).group_size
      16

    Reference: the 1xN block of Xiang et al., "SUBP", NeurIPS 2023.
    """

    group_size: int = dataclasses.field(metadata={"static": True})
    packed: BlockLayout | None = None

    def read(self, mask: Bool[Array, "..."]) -> BlockLayout:
        """The layout of a concrete mask."""
        return mask_to_layout(mask, jnp.arange(mask.shape[-1]).reshape(-1, self.group_size))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FilterGroups:
    """The layout of a leaf in groups of any filters whose kept counts change in training.

    As `ConsecutiveGroups`, for groups that a search chose: HRBP's blocks while a gradual
    method prunes them.

    Attributes:
      filters: int32 `[groups, group_size]`, a partition of `range(cout)`.
      channel_block: channels come in aligned runs of this many (static).
      packed: in the state of packed values, their layout.

    Example:
      >>> FilterGroups(jnp.array([[0, 2], [1, 3]])).filters.shape
      (2, 2)
    """

    filters: jax.Array  # int32[groups, group_size]
    channel_block: int = dataclasses.field(default=1, metadata={"static": True})
    packed: BlockLayout | None = None

    def read(self, mask: Bool[Array, "..."]) -> BlockLayout:
        """The layout of a concrete mask."""
        layout = mask_to_layout(mask, self.filters)
        return dataclasses.replace(layout, channel_block=self.channel_block)


ShrinkingLayout = ConsecutiveGroups | FilterGroups
Layout = BlockLayout | Dense | ShrinkingLayout


def is_layout(node: Any) -> TypeGuard[Layout]:
    """True for a node of a layout tree: pass it as `is_leaf` to `jax.tree.map`.

    Args:
      node: anything.

    Returns:
      Whether `node` is a `BlockLayout`, `Dense`, `ConsecutiveGroups` or `FilterGroups`.

    Example:
      >>> is_layout(Dense()), is_layout({})
      (True, False)
    """
    return isinstance(node, Layout)


def channel_layout(
    filters: Int[Array, "groups group_size"],
    kept_runs: Bool[Array, "groups runs"],
    taps: Int[Array, "groups kept_taps"],
    shape: tuple[int, int, int, int],
    *,
    kept: int,
) -> BlockLayout:
    """Makes a layout from the runs of channels that each group keeps.

    Args:
      filters: int32, the groups.
      kept_runs: which aligned runs of channels each group keeps, `kept / run length` in each row.
      taps: int32, the kept positions of each group.
      shape: `(kh, kw, cin, cout)` of the conv kernel.
      kept: input channels that each group keeps; the static count behind `kept_runs`.

    Returns:
      The layout.

    Example:
      >>> runs = jnp.array([[False, True], [True, False]])
      >>> filters, taps = jnp.array([[0], [1]]), jnp.array([[0], [0]])
      >>> channel_layout(filters, runs, taps, (1, 1, 4, 2), kept=2).channels.tolist()
      [[2, 3], [0, 1]]
    """
    run = shape[2] // kept_runs.shape[1]
    first = jnp.argsort(~kept_runs, axis=1, stable=True)[:, : kept // run].astype(jnp.int32)
    channels = first[:, :, None] * run + jnp.arange(run, dtype=jnp.int32)[None, None]
    return BlockLayout(filters, channels.reshape(len(filters), kept), taps, shape, run)


def validate(layout: BlockLayout) -> BlockLayout:
    """Checks a layout's arrays.

    They are a partition of the filters, ascending distinct channels and taps in range, aligned
    runs.

    Args:
      layout: a concrete layout, or a stack (call outside of jit).

    Returns:
      The same layout.

    Raises:
      ValueError: names the field, the value and what was expected.

    Example:
      >>> layout = mask_to_layout(jnp.ones((3, 3, 4, 8), bool))
      >>> validate(layout).packed_shape
      (1, 4, 9, 8)
    """
    if not isinstance(layout, BlockLayout):
        raise ValueError(
            f"layout: expected a BlockLayout, got {type(layout).__name__}; a dense leaf has "
            f"nothing to validate"
        )
    if len(layout.shape) not in (2, 4):
        raise ValueError(
            f"layout.shape: expected (kh, kw, cin, cout), or (cin, cout) of a dense kernel, got "
            f"{layout.shape}"
        )
    if layout.kernels.stack:
        for one in _unstacked(layout):
            validate(one)
        return layout
    kh, kw, cin, cout = kernels("layout.shape", layout.shape).conv_shape
    filters, channels, taps = (
        _checks.concrete(f"layout.{n}", getattr(layout, n)) for n in ("filters", "channels", "taps")
    )
    for name, array in (("filters", filters), ("channels", channels), ("taps", taps)):
        if (
            array.ndim != 2
            or array.shape[0] != filters.shape[0]
            or not np.issubdtype(array.dtype, np.integer)
        ):
            raise ValueError(
                f"layout.{name}: expected an integer array [groups={filters.shape[0]}, n], got "
                f"{array.dtype}{list(array.shape)}"
            )
    _checks.partition("layout.filters", filters, cout)
    for name, array, bound in (("channels", channels, cin), ("taps", taps, kh * kw)):
        if array.size and (array.min() < 0 or array.max() >= bound):
            raise ValueError(
                f"layout.{name}: index {array.min()}..{array.max()} out of range, expected "
                f"0..{bound - 1}"
            )
        if (np.diff(array, axis=1) <= 0).any():
            raise ValueError(
                f"layout.{name}: each row must be strictly ascending (sorted, no repeats); sort it "
                f"with np.sort(..., axis=1)"
            )
    block = _checks.positive_int("layout.channel_block", layout.channel_block)
    if channels.shape[1] % block or cin % block:
        raise ValueError(
            f"layout.channel_block: {block} must divide kept={channels.shape[1]} and cin={cin}"
        )
    runs = channels.reshape(channels.shape[0], -1, block)
    if (runs[..., :1] % block).any() or (np.diff(runs, axis=-1) != 1).any():
        raise ValueError(
            f"layout.channels: expected aligned runs of channel_block={block} consecutive channels"
        )
    return layout


def layout_to_mask(layout: BlockLayout) -> Bool[Array, "..."]:
    """The mask that a layout stands for: True at `taps x channels x filters` of every group.

    Args:
      layout: a layout, or a stack.

    Returns:
      bool in the shape of the parameter, `[kh, kw, cin, cout]` of a conv kernel, True = kept.

    Example:
      >>> filters, channels, taps = ([[0, 2], [1, 3]], [[0], [2]], [[0], [0]])
      >>> layout = BlockLayout(*map(jnp.array, (filters, channels, taps)), shape=(1, 1, 4, 4))
      >>> layout_to_mask(layout)[0, 0].astype(int).tolist()
      [[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]]
    """
    return _mask(layout)


@functools.partial(jax.jit, inline=True)  # outside of jit one program, not one an operation
def _mask(layout: BlockLayout) -> Array:
    kh, kw, cin, cout = layout.kernels.conv_shape

    def mask_of(layout: BlockLayout) -> Array:
        return jnp.zeros((kh * kw, cin, cout), bool).at[block_index(layout)].set(True)

    return layout.kernels.each(mask_of)(layout).reshape(layout.full_shape)


def conv_layout(layout: Any) -> Any:
    """The layout as that of conv kernels: the one of a dense kernel becomes a 1x1 convolution's.

    Args:
      layout: any layout, or a stack.

    Returns:
      The same but for the shape; what is no `BlockLayout`, as it is.

    Example:
      >>> conv_layout(mask_to_layout(jnp.ones((4, 8), bool))).shape
      (1, 1, 4, 8)
    """
    if not isinstance(layout, BlockLayout):
        return layout
    return dataclasses.replace(layout, shape=layout.kernels.conv_shape)


def block_index(
    layout: BlockLayout,
) -> tuple[Int[Array, "g 1 t 1"], Int[Array, "g k 1 1"], Int[Array, "g 1 1 s"]]:
    """Index arrays into a kernel `[kh * kw, cin, cout]` that broadcast to the packed shape.

    Args:
      layout: a layout of one kernel.

    Returns:
      `(taps, channels, filters)` with shapes `[groups, 1, kept_taps, 1]`, `[groups, kept, 1, 1]`,
      `[groups, 1, 1, group_size]`.

    Example:
      >>> layout = mask_to_layout(jnp.ones((1, 1, 2, 4), bool))
      >>> [i.shape for i in block_index(layout)]
      [(1, 1, 1, 1), (1, 2, 1, 1), (1, 1, 1, 4)]
    """
    return Index(layout.filters, layout.channels, layout.taps).positions()


def mask_to_layout(
    mask: Bool[Array | np.ndarray, "..."],
    filters: Int[Array, "... groups group_size"] | None = None,
) -> BlockLayout:
    """Reads the layout off a block-structured mask (on the host: the kept counts become shapes).

    Args:
      mask: bool `[kh, kw, cin, cout]`, concrete; or `[cin, cout]` of a dense kernel, or stacked
        `[layers, kh, kw, cin, cout]`, whose layouts are stacked alike.
      filters: int `[groups, group_size]`, the groups (of a stack: of every kernel, or stacked);
        None groups the filters whose masks are equal.

    Returns:
      A layout with `layout_to_mask(layout) == mask`.

    Raises:
      ValueError: the mask is no such pattern; the message says at which group and why. Or the
        kernels of a stack keep different counts.

    Example:
      >>> mask = jnp.zeros((3, 3, 4, 4), bool).at[1, :, 0, :2].set(True).at[0, :, 3, 2:].set(True)
      >>> layout = mask_to_layout(mask)
      >>> layout.filters.tolist(), layout.channels.tolist(), layout.taps.tolist()
      ([[0, 1], [2, 3]], [[0], [3]], [[3, 4, 5], [0, 1, 2]])
    """
    flat = _checks.concrete("mask", mask)
    of = kernels("mask.shape", flat.shape)
    _checks.boolean("mask", flat.dtype)
    if of.stack:
        return _stack_of_masks(flat, of, filters)
    kh, kw, cin, cout = of.conv_shape
    flat = flat.reshape(kh * kw, cin, cout)
    groups = _equal_filters(flat) if filters is None else _checks.concrete("filters", filters)
    _checks.partition("filters", groups, cout)
    channel_lists, tap_lists = [], []
    for g, members in enumerate(groups):
        block = flat[:, :, members]
        kept_channels, kept_taps = np.asarray(block.any((0, 2))), np.asarray(block.any((1, 2)))
        if not (block == (kept_taps[:, None, None] & kept_channels[None, :, None])).all():
            raise ValueError(
                f"mask: group {g} (filters {members[:4].tolist()}...) is not one block of channels "
                f"x taps; run it masked-dense"
            )
        channel_lists.append(np.flatnonzero(kept_channels))
        tap_lists.append(np.flatnonzero(kept_taps))
    counts = {(len(c), len(t)) for c, t in zip(channel_lists, tap_lists)}
    if len(counts) != 1:
        raise ValueError(
            f"mask: groups keep different (channels, taps) counts {sorted(counts)[:4]}, expected "
            f"one; run it masked-dense"
        )
    channels, taps = (
        jnp.asarray(np.array(channel_lists), jnp.int32),
        jnp.asarray(np.array(tap_lists), jnp.int32),
    )
    return BlockLayout(jnp.asarray(groups, jnp.int32), channels, taps, of.shape)


def _stack_of_masks(masks: np.ndarray, of: Kernels, filters: Any) -> BlockLayout:
    """The stacked layouts of stacked masks; ValueError where they differ in a count."""
    masks = masks.reshape(of.count, *of.shape)
    groups: list[Any] = [None] * of.count
    if filters is not None:
        filters = _checks.concrete("filters", filters)
        groups = list(
            np.broadcast_to(filters, (*of.stack, *filters.shape[-2:])).reshape(
                of.count, *filters.shape[-2:]
            )
        )
    layouts = [mask_to_layout(mask, members) for mask, members in zip(masks, groups, strict=True)]
    shapes = {layout.packed_shape for layout in layouts}
    if len(shapes) != 1:
        raise ValueError(
            f"mask: stacked kernels keep different counts (groups, channels, taps, group size) "
            f"{sorted(shapes)[:4]}, expected one; run it masked-dense"
        )
    return jax.tree.map(
        lambda *arrays: jnp.stack(arrays).reshape(*of.stack, *arrays[0].shape), *layouts
    )


def _unstacked(layout: BlockLayout) -> list[BlockLayout]:
    """The layouts of a stack, one by one; ValueError where the arrays have other leading axes."""
    stack = layout.kernels.stack
    for name in ("channels", "taps"):
        if getattr(layout, name).shape[:-2] != stack:
            raise ValueError(
                f"layout.{name}: expected the leading axes {stack} of layout.filters, got shape "
                f"{getattr(layout, name).shape}"
            )
    return [jax.tree.map(lambda a, i=i: a[i], layout) for i in np.ndindex(stack)]


def _equal_filters(flat: np.ndarray) -> np.ndarray:
    """Filters with equal masks, in groups of one size: the gcd of the sizes of all classes."""
    _, classes, sizes = np.unique(
        np.packbits(flat.reshape(-1, flat.shape[-1]), axis=0),
        axis=1,
        return_inverse=True,
        return_counts=True,
    )
    groups = np.argsort(classes.reshape(-1), kind="stable").reshape(-1, math.gcd(*sizes.tolist()))
    return groups[np.argsort(groups[:, 0], kind="stable")]
