"""BlockLayout: the index arrays that say which weights of a conv kernel are kept.

A layout partitions the filters (output channels) of a conv kernel into groups of equal size. All
filters of a group keep the same input channels and, at those, the same taps, so a group is one
dense block. Every array has a static shape: new masks never recompile.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from blocksparse_jax.kernels import Kernels
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
      >>> import blocksparse_jax as bsj
      >>> conv_layout(bsj.mask_to_layout(jnp.ones((4, 8), bool))).shape
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
      >>> import blocksparse_jax as bsj
      >>> layout = bsj.mask_to_layout(jnp.ones((1, 1, 2, 4), bool))
      >>> [i.shape for i in block_index(layout)]
      [(1, 1, 1, 1), (1, 2, 1, 1), (1, 1, 1, 4)]
    """
    return Index(layout.filters, layout.channels, layout.taps).positions()
