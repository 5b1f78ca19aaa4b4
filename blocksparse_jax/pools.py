"""The max pool behind a batch norm."""

from typing import Any

from jaxtyping import Array, Float

from blocksparse_jax import _checks
from blocksparse_jax.norm_act_conv import norm_act_max_pool
from blocksparse_jax.pending import PendingActivations, activations
from pallas_kernels.max_pool import max_pool as _max_pool


def max_pool(x: Any, size: int = 2) -> Float[Array, "a ho wo b"]:
    """The maximum of each `size x size` tile of an image.

    As `flax.linen.max_pool(x, (size, size), strides=(size, size))`: the first of equal maxima takes
    the gradient, and rows and columns that fill no tile are left out. The gradient is one pass over
    memory. Pending activations are normalised as they are compared, and neither they nor their
    gradient are written.

    Args:
      x: activations, the image on axes 1 and 2 ("NHWC" and "CHWN" alike), or `PendingActivations`.
      size: of the tiles in pixels.

    Returns:
      The maxima.

    Raises:
      ValueError: the size is not a positive integer, or larger than the image.

    Example:
      >>> import jax.numpy as jnp
      >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, :, :, 0].tolist()
      [[5.0, 7.0], [13.0, 15.0]]
    """
    size = _checks.positive_int("size", size)
    image = x.shape[1:3]
    if size > min(image):
        raise ValueError(f"size: expected at most the image's size {image}, got {size}")
    height, width = (pixels // size * size for pixels in image)
    if (
        isinstance(x, PendingActivations)
        and x.shortcut is None
        and x.read_as(x.dtype)
        and (height, width) == image
    ):
        return norm_act_max_pool(
            *(x.z, x.sums, x.scale, x.bias),
            size,
            relu=x.relu,
            epsilon=x.epsilon,
            data_format=x.data_format,
        )
    return _max_pool(activations(x)[:, :height, :width], size)
