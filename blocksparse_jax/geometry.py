"""Strides, padding and dilation of a convolution, in the forms that callers write them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jax import lax

from blocksparse_jax import _checks

Pair = tuple[int, int]
Padding = str | Sequence[tuple[int, int]]


class Geometry(NamedTuple):
    """How a convolution goes over an image.

    Attributes:
      strides: step in pixels `(y, x)`.
      padding: zeros around the image in pixels `((top, bottom), (left, right))`.
      dilation: distance between taps in pixels `(y, x)`.

    Example:
      >>> Geometry(strides=(2, 2)).dilation
      (1, 1)
    """

    strides: Pair = (1, 1)
    padding: tuple[Pair, Pair] = ((0, 0), (0, 0))
    dilation: Pair = (1, 1)


def explicit_geometry(
    size: Sequence[int],
    kernel_size: Sequence[int],
    strides: int | Sequence[int],
    padding: Padding,
    dilation: int | Sequence[int],
) -> Geometry:
    """Checks the arguments of a convolution and writes them out.

    Args:
      size: height and width of the image in pixels.
      kernel_size: `(kh, kw)`.
      strides: step in pixels, one integer or two.
      padding: "SAME", "VALID" or `((top, bottom), (left, right))` in pixels.
      dilation: distance between taps in pixels, one integer or two.

    Returns:
      The geometry in integers.

    Raises:
      ValueError: an argument is none of these forms; the message names it.

    Example:
      >>> explicit_geometry((8, 8), (3, 3), 2, "SAME", 1)
      Geometry(strides=(2, 2), padding=((0, 1), (0, 1)), dilation=(1, 1))
    """
    strides = _checks.pair("strides", strides)
    dilation = _checks.pair("dilation", dilation)
    if isinstance(padding, str):
        name = _checks.choice("padding", padding.upper(), ("SAME", "VALID"))
        reach = [(taps - 1) * step + 1 for taps, step in zip(kernel_size, dilation, strict=True)]
        (top, bottom), (left, right) = lax.padtype_to_pads(size, reach, strides, name)
    else:
        (top, bottom), (left, right) = _pairs(padding)
    explicit = ((int(top), int(bottom)), (int(left), int(right)))
    if min(map(min, explicit)) < 0:
        raise ValueError(f"padding: expected pixels of at least 0, got {padding!r}; crop x instead")
    return Geometry(strides, explicit, dilation)


def _pairs(padding: Any) -> tuple[Pair, Pair]:
    """ValueError unless the padding is two pairs of integers."""
    try:
        (top, bottom), (left, right) = padding
        return (int(top), int(bottom)), (int(left), int(right))
    except (TypeError, ValueError):
        raise ValueError(
            f'padding: expected "SAME", "VALID" or ((top, bottom), (left, right)), got {padding!r}'
        ) from None
