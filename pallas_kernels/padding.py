"""Rounding sizes up, and filling arrays up to them."""

import jax
import jax.numpy as jnp


def round_up(size: int, multiple: int) -> int:
    """The least multiple that is not below a size.

    Args:
      size: at least 0.
      multiple: at least 1.

    Returns:
      `ceil(size / multiple) * multiple`.

    Example:
      >>> round_up(13, 8)
      16
    """
    return -(-size // multiple) * multiple


def pad_to(array: jax.Array, shape: tuple[int, ...], value: float = 0) -> jax.Array:
    """Appends a value to each axis until an array has a shape.

    Args:
      array: the array.
      shape: at least the array's shape along each axis.
      value: what is appended.

    Returns:
      The array in that shape; itself where it has the shape.

    Example:
      >>> pad_to(jnp.ones((1, 2), int), (2, 3), -1).tolist()
      [[1, 1, -1], [-1, -1, -1]]
    """
    if array.shape == shape:
        return array
    widths = [(0, size - axis) for axis, size in zip(array.shape, shape, strict=True)]
    return jnp.pad(array, widths, constant_values=value)
