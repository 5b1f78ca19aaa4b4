"""Augmentation and normalisation of image batches, in jit on the device."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8


def augment(
    key: Key[Array, ""], images: UInt8[Array, "n h w c"], *, pad: int, flip: bool
) -> UInt8[Array, "n h w c"]:
    """Shift each image by up to `pad` pixels each way, zeros entering, and mirror half of them left
    to right.

    Equal to a random crop of the zero-padded image: out[n, i, j] = in[n, i + dy, ±j + dx] with dy,
    dx uniform over -pad .. pad; a gather per axis, the mirror folded into the column indices.

    Args:
        key: random key.
        images: pixels [n, h, w, c].
        pad: largest shift, in pixels; 0 for none.
        flip: whether images are mirrored, each with probability 1/2.

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
    n, h, w, _ = images.shape
    shift_key, flip_key = jax.random.split(key)
    shift = jax.random.randint(shift_key, (n, 2, 1), -pad, pad + 1)
    mirrored = jax.random.bernoulli(flip_key, 0.5, (n, 1)) & flip
    columns = jnp.arange(w)
    rows = jnp.arange(h) + shift[:, 0]
    columns = jnp.where(mirrored, columns[::-1], columns) + shift[:, 1]
    return _take(_take(images, rows[:, :, None, None], 1), columns[:, None, :, None], 2)


def _take(images: Array, index: Array, axis: int) -> Array:
    """`take_along_axis` where indices outside of the image read zeros."""
    outside = images.shape[axis]
    return jnp.take_along_axis(
        images, jnp.where(index < 0, outside, index), axis, mode="fill", fill_value=0
    )


def normalize(
    images: UInt8[Array, "n h w c"], mean: Sequence[float], std: Sequence[float]
) -> Float[Array, "n h w c"]:
    """(images / 255 - mean) / std, per channel, in float32.

    Args:
        images: pixels [n, h, w, c], 0..255.
        mean: mean of each of the c channels, in units of the full range 0..1.
        std: standard deviation of each channel, same units.

    Returns:
        Float images [n, h, w, c].

    Example:
        >>> normalize(jnp.full((1, 1, 1, 1), 255, jnp.uint8), (0.5,), (0.25,)).item()
        2.0
    """
    scale = 1 / jnp.asarray(std, jnp.float32)
    return images.astype(jnp.float32) * (scale / 255) - jnp.asarray(mean, jnp.float32) * scale
