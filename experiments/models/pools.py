"""The zoo's max pool, and the windows that it shares with depthwise convs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

import blocksparse_jax as bsj


def max_pool(x: Any, size: int, strides: int, padding: int = 0) -> Float[Array, "a ho wo b"]:
    """Maximum over windows of the image axes 1 and 2, in NHWC and CHWN alike.

    It compares shifted slices, along the rows first, then along the columns. On a CPU, forward and
    backward run 3-5 times faster than `reduce_window` and its scatter. Where windows tile an image,
    the first of equal maxima takes the gradient, as in `reduce_window`; else they share it.

    Args:
      x: activations, the image on axes 1 and 2; may be pending.
      size: of the window in pixels.
      strides: step in pixels.
      padding: pixels of minus infinity on each side.

    Returns:
      The maxima.

    Example:
      >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1), 2, 2)[0, :, :, 0].tolist()
      [[5.0, 7.0], [13.0, 15.0]]
    """
    if size == strides and not padding:
        return bsj.max_pool(x, size)
    x = pad_image(bsj.activations(x), padding, -jnp.inf)
    for axis in (1, 2):
        x = functools.reduce(jnp.maximum, windows(x, axis, size, strides))
    return x


def pad_image(x: jax.Array, padding: int, value: float) -> jax.Array:
    """Activations with so many pixels of a value on each side of the image."""
    pixels = (padding, padding)
    return jnp.pad(x, ((0, 0), pixels, pixels, (0, 0)), constant_values=value) if padding else x


def windows(x: jax.Array, axis: int, size: int, strides: int) -> list[jax.Array]:
    """The i-th pixel of every window along an axis, for each i below `size`."""
    last = (x.shape[axis] - size) // strides * strides
    return [lax.slice_in_dim(x, i, i + last + 1, strides, axis) for i in range(size)]
