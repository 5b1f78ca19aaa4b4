"""The check of a layout's arrays, for layouts that users make or restore."""

import jax
import numpy as np

from blocksparse_jax import _checks
from blocksparse_jax.kernels import kernels
from blocksparse_jax.layout import BlockLayout


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
      >>> import blocksparse_jax as bsj
      >>> layout = bsj.mask_to_layout(np.ones((3, 3, 4, 8), bool))
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
