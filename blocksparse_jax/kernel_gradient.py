"""The gradient with respect to a whole conv kernel, pruned weights too."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from blocksparse_jax import _checks
from blocksparse_jax.geometry import Padding, explicit_geometry, with_border
from pallas_kernels.block_sparse_conv import runs_whole_kernels, whole_kernel_conv
from pallas_kernels.dense_conv import dense_conv
from pallas_kernels.sharding import CONVOLUTION, over_images


def dense_kernel_gradient(
    x: Float[Array, "a h w b"],
    dy: Float[Array, "c ho wo d"],
    kernel_size: Sequence[int],
    *,
    strides: int | Sequence[int] = (1, 1),
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = (1, 1),
    data_format: str = "NHWC",
    precision: Any = None,
) -> Float[Array, "kh kw cin cout"]:
    """The gradient by which dynamic methods grow weights: that of the whole kernel.

    Args:
      x: the convolution's input.
      dy: the gradient with respect to its output, in the same data format.
      kernel_size: `(kh, kw)`.
      strides: step in pixels `(y, x)`.
      padding: as in `conv`.
      dilation: distance between taps in pixels `(y, x)`.
      data_format: "NHWC" or "CHWN".
      precision: as in `lax.conv_general_dilated`.

    Returns:
      `[kh, kw, cin, cout]` in `x.dtype`.

    Raises:
      ValueError: an argument is unknown, or `dy` does not fit `x`.

    Example:
      >>> import jax.numpy as jnp
      >>> dense_kernel_gradient(jnp.ones((1, 4, 4, 2)), jnp.ones((1, 4, 4, 3)), (3, 3)).shape
      (3, 3, 2, 3)

    Reference: the growth score of Evci et al., "RigL", ICML 2020.
    """
    data_format = _checks.data_format(data_format)
    if len(kernel_size) != 2:
        raise ValueError(f"kernel_size: expected (kh, kw), got {tuple(kernel_size)}")
    channel_axis = data_format.index("C")
    kernel_shape = (*kernel_size, x.shape[channel_axis], dy.shape[channel_axis])
    x = with_border(x, kernel_size, padding, dilation)
    geometry = explicit_geometry(x.shape[1:3], kernel_size, strides, padding, dilation)
    kernel = jax.ShapeDtypeStruct(kernel_shape, x.dtype)

    def forward(x: Array, kernel: Array) -> Array:
        return dense_conv(
            x, kernel, **geometry._asdict(), data_format=data_format, precision=precision
        )

    y = jax.eval_shape(forward, x, kernel)
    if y.shape != dy.shape:
        raise ValueError(f"dy: expected the convolution's output shape {y.shape}, got {dy.shape}")

    if data_format == "CHWN" and runs_whole_kernels(x, kernel_shape):
        zeros = jnp.zeros(kernel_shape, x.dtype)  # which the gradient does not depend on

        def convolve(kernel: Array) -> Array:
            return whole_kernel_conv(x, kernel, **geometry._asdict(), precision=precision)

        return jax.vjp(convolve, zeros)[1](dy.astype(y.dtype))[0]

    def gradient(x: Array, dy: Array) -> Array:
        transpose = jax.linear_transpose(lambda kernel: forward(x, kernel), kernel)
        return transpose(dy)[0]

    of_x, of_kernel, of_y = CONVOLUTION[data_format]
    return over_images(gradient, (of_x, of_y), of_kernel, xla=True)(x, dy.astype(y.dtype))
