"""Augmentation and normalisation of image batches, in jit on the device."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8


def augment(
    key: Key[Array, ""], images: UInt8[Array, "n h w c"], *, pad: int, flip: bool
) -> UInt8[Array, "n h w c"]:
    """Crops each image at random from its zero-padded copy, and mirrors half of them.

    `out[n, i, j] = in[n, i + dy, ±j + dx]` with dy, dx uniform over -pad .. pad, and 0 outside of
    the image. Each axis takes one gather; the mirror is part of the column indices.

    Args:
      key: random key.
      images: pixels `[n, h, w, c]`.
      pad: largest shift in pixels; 0 for none.
      flip: whether each image is mirrored left to right with probability 1/2.

    Returns:
      Images of the same shape and dtype.

    Example:
      >>> images = jnp.ones((2, 4, 4, 1), jnp.uint8)
      >>> augment(jax.random.key(0), images, pad=0, flip=True).tolist() == images.tolist()
      True

    Reference: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2 (pad
    4, crop, flip).
    """
    if not pad and not flip:
        return images
    # The dtypes are explicit, so that the draws are the same where 64 bits are on.
    n, h, w, _ = images.shape
    shift_key, flip_key = jax.random.split(key)
    shift = jax.random.randint(shift_key, (n, 2, 1), -pad, pad + 1, jnp.int32)
    mirrored = jax.random.bernoulli(flip_key, jnp.float32(0.5), (n, 1)) & flip
    rows = jnp.arange(h, dtype=jnp.int32)[None] + shift[:, 0]
    columns = jnp.arange(w, dtype=jnp.int32)[None]
    columns = jnp.where(mirrored, columns[:, ::-1], columns) + shift[:, 1]
    return _take(_take(images, rows[:, :, None, None], 1), columns[:, None, :, None], 2)


def _take(images: Array, index: Array, axis: int) -> Array:
    """`jnp.take_along_axis`, except that indices outside of the image read zeros."""
    size = images.shape[axis]
    index = jnp.where(index < 0, size, index)  # a negative index would count from the end
    return jnp.take_along_axis(images, index, axis, mode="fill", fill_value=0)


def normalize(
    images: UInt8[Array, "n h w c"], mean: Sequence[float], std: Sequence[float]
) -> Float[Array, "n h w c"]:
    """Computes `(images / 255 - mean) / std` for each channel, in float32.

    Args:
      images: pixels `[n, h, w, c]`, 0..255.
      mean: mean of each of the c channels, where 1 is the brightest pixel.
      std: standard deviation of each channel, in the same units.

    Returns:
      Float images `[n, h, w, c]`.

    Example:
      >>> normalize(jnp.full((1, 1, 1, 1), 255, jnp.uint8), (0.5,), (0.25,)).item()
      2.0
    """
    scale = 1 / jnp.asarray(std, jnp.float32).reshape(1, 1, 1, -1)
    offset = jnp.asarray(mean, jnp.float32).reshape(1, 1, 1, -1) * scale
    return images.astype(jnp.float32) * (scale / 255) - offset
