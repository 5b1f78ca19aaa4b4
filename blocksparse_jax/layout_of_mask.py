"""The layout of a mask, read on the host."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from blocksparse_jax import _checks
from blocksparse_jax.kernels import Kernels, kernels
from blocksparse_jax.layout import BlockLayout


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
