"""Strides, padding and dilation of a convolution, in the forms that callers write them."""

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from blocksparse_jax import _checks

Pair = tuple[int, int]
Padding = str | int | Sequence[int | Sequence[int]]
"""The forms that `nn.Conv` takes: a name, an integer, or for each axis an integer or a pair."""
_ZEROS = ("SAME", "VALID", "SAME_LOWER")
_BORDERS = {"CIRCULAR": "wrap", "REFLECT": "reflect"}
"""Paddings by pixels of the image, and their modes in `jnp.pad`."""


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


def with_border(
    x: jax.Array, kernel_size: Sequence[int], padding: Padding, dilation: int | Sequence[int]
) -> jax.Array:
    """Puts pixels of the image around it where the padding consists of these.

    As in `nn.Conv`, "CIRCULAR" continues the image periodically and "REFLECT" mirrors it at its
    outermost pixels, by half of the kernel's reach on each side (an odd pixel comes at the end), so
    that at stride 1 the output has the size of the input.

    Args:
      x: activations whose axes 1 and 2 are height and width.
      kernel_size: `(kh, kw)`.
      padding: in any form.
      dilation: distance between taps in pixels, one integer or two.

    Returns:
      The activations with their border; as they are for every other padding.

    Raises:
      ValueError: the padding is an unknown name, or the image has no pixels to repeat.

    Example:
      >>> x = jnp.arange(3.0).reshape(1, 1, 3, 1)
      >>> with_border(x, (1, 3), "CIRCULAR", 1).ravel().tolist()
      [2.0, 0.0, 1.0, 2.0, 0.0]
      >>> with_border(x, (1, 3), "SAME", 1).ravel().tolist()
      [0.0, 1.0, 2.0]
    """
    mode = _BORDERS.get(_padding_name(padding)) if isinstance(padding, str) else None
    if mode is None:
        return x
    if x.shape[1] * x.shape[2] == 0:
        raise ValueError(f"padding: {padding!r} repeats pixels, but x has none, shape {x.shape}")
    distances = _checks.pair("dilation", dilation)
    reach = [(taps - 1) * step for taps, step in zip(kernel_size, distances, strict=True)]
    edges = [(0, 0), *((pixels // 2, (pixels + 1) // 2) for pixels in reach), (0, 0)]
    return jnp.pad(x, edges, mode=mode)


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
      padding: "SAME", "VALID", "SAME_LOWER", or pixels: an integer, or for each axis an integer or
        a pair. "CIRCULAR" and "REFLECT" mean an image that has its border, see `with_border`.
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
        name = _padding_name(padding)
        name = "VALID" if name in _BORDERS else name
        reach = [(taps - 1) * step + 1 for taps, step in zip(kernel_size, dilation, strict=True)]
        (top, bottom), (left, right) = lax.padtype_to_pads(size, reach, strides, name)
        return Geometry(strides, ((int(top), int(bottom)), (int(left), int(right))), dilation)
    explicit = _pairs(padding)
    if min(map(min, explicit)) < 0:
        raise ValueError(f"padding: expected pixels of at least 0, got {padding!r}; crop x instead")
    return Geometry(strides, explicit, dilation)


def images_of_rows(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """The shape in which a 1x1 convolution takes rows: `(n, h, w, cin)`.

    Every row is an image of one pixel, which makes the transposition to CHWN one of a matrix. On
    several devices the first axis alone counts the images, so that a batch may stay sharded, and
    the axes between are their pixels.

    Args:
      shape: of `[..., cin]`.

    Returns:
      A shape of as many elements.

    Example:
      >>> images_of_rows((8, 4)), math.prod(images_of_rows((2, 3, 5, 4)))
      ((8, 1, 1, 4), 120)
    """
    *rows, cin = shape
    if jax.device_count() == 1 or not rows or 0 in rows:
        return math.prod(rows), 1, 1, cin
    return rows[0], 1, math.prod(rows[1:]), cin


def _padding_name(padding: str) -> str:
    """The name in capitals; ValueError unless it is a padding of images."""
    name = padding.upper()
    if name == "CAUSAL":
        raise ValueError(
            "padding: 'CAUSAL' is for sequences (1-D convolutions), and this convolves images; "
            "give the pixels of each axis, e.g. ((dilation * (kh - 1), 0), (0, 0))"
        )
    return _checks.choice("padding", name, (*_ZEROS, *_BORDERS))


def _pairs(padding: Any) -> tuple[Pair, Pair]:
    """ValueError unless the padding is an integer, or for each of two axes an integer or a pair."""
    try:
        vertical, horizontal = _two(padding)
        (top, bottom), (left, right) = _two(vertical), _two(horizontal)
        top, bottom, left, right = map(operator.index, (top, bottom, left, right))
        return (top, bottom), (left, right)
    except (TypeError, ValueError):
        expected = ", ".join(map(repr, (*_ZEROS, *_BORDERS)))
        raise ValueError(
            f"padding: expected one of {expected}, an integer, or for each of the two axes an "
            f"integer or a pair (low, high), got {padding!r}"
        ) from None


def _two(value: Any) -> Any:
    """One value for both, or the two that there are."""
    return value if hasattr(value, "__len__") else (value, value)
