"""The dense convolution by the block-sparse kernels: blocks that keep everything.

XLA's dense convolution on a CPU (jax 0.10) takes up to three times as long in its gradients as the
native kernels take with everything kept, and works in NHWC alone: it transposes CHWN activations.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.block_sparse_conv import cpu
from pallas_kernels.block_sparse_conv.api import block_sparse_conv
from pallas_kernels.block_sparse_conv.cpu.launch import DTYPES

LARGEST_GROUP = 64
"""The most filters of a block: among 16 to 512, groups of 64 took the least time, measured on 2
cores of a CPU with AVX-512 at the sizes of VGG-19 and ResNet-32, batch 128."""
SMALLEST = 8
"""The fewest input channels, and filters of a block. Stems run as one matrix product."""


def runs_whole_kernels(x: Any, kernel_shape: Sequence[int]) -> bool:
    """Whether a dense convolution in CHWN runs in the native kernels.

    It does on a CPU that has them, for kernels larger than 1x1 (which are one matrix product) of at
    least 8 input channels and a multiple of 8 filters.

    Args:
      x: the activations `[cin, h, w, n]`, or anything with their shape and dtype.
      kernel_shape: `(kh, kw, cin, cout)`.

    Returns:
      A bool.

    Example:
      >>> import jax
      >>> runs_whole_kernels(jax.ShapeDtypeStruct((3, 8, 8, 2), jnp.float32), (3, 3, 3, 16))
      False
    """
    kh, kw, cin, cout = kernel_shape
    return (
        kh * kw > 1
        and cin >= SMALLEST
        and cout % SMALLEST == 0
        and jnp.dtype(x.dtype).name in DTYPES
        and all(isinstance(size, int) and size > 0 for size in x.shape)
        and cpu.unavailable() is None
    )


def whole_kernel_conv(
    x: Float[Array, "cin h w n"], kernel: Float[Array, "kh kw cin cout"], **options: Any
) -> Float[Array, "cout ho wo n"]:
    """Convolves with every weight of a conv kernel.

    Args:
      x: activations.
      kernel: the whole kernel.
      **options: strides, padding, dilation, the epilogue and precision, as in `block_sparse_conv`.

    Returns:
      Activations in the dtype of x.

    Example:
      >>> x, kernel = jnp.ones((8, 3, 3, 2)), jnp.ones((3, 3, 8, 8))
      >>> float(whole_kernel_conv(x, kernel)[0, 0, 0, 0])
      72.0
    """
    kh, kw, cin, cout = kernel.shape
    group_size = next(size for size in range(min(LARGEST_GROUP, cout), 0, -1) if not cout % size)
    groups = cout // group_size
    values = kernel.reshape(kh * kw, cin, groups, group_size).transpose(2, 1, 0, 3)
    return block_sparse_conv(
        x,
        values,
        filters=jnp.arange(cout).reshape(groups, group_size),
        channels=_every(groups, cin),
        taps=_every(groups, math.prod((kh, kw))),
        kernel_shape=(kh, kw, cin, cout),
        implementation="cpu",
        **options,
    )


def _every(groups: int, count: int) -> jax.Array:
    """`[groups, count]`: all indices below `count`, for each group."""
    return jnp.broadcast_to(jnp.arange(count), (groups, count))
