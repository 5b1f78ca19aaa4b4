"""A dense convolution as a sum over the kernel's taps, one matrix product each: what a CPU runs
best on small images of many channels.
"""

import itertools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax import lax
from jaxtyping import Array, Float

from blocksparse_jax.conv import finish
from blocksparse_jax.layout import Dense
from blocksparse_jax.linen import BlockSparseConv, channel_axis, pair

Pair = tuple[int, int]
PIXELS, WEIGHTS = (
    16,
    128 * 256,
)  # measured: at most so many output pixels, at least so many weights per tap


class Conv(BlockSparseConv):
    """`BlockSparseConv` without bias, whose dense kernels run as `tap_conv` where that is the
    faster one; `padding` is in pixels.

    Same params, same function. XLA's CPU convolution (jax 0.10) is half as fast as the nine matrix
    products at 512 channels of 4x4 pixels, and at 2x2 pixels meets a path that is 40 times slower:
    a VGG-19 made of it would be no dense network to compare with.

    Attributes:
      tap_pixels: the largest output that may run as `tap_conv`, in pixels.
    """

    tap_pixels: int = PIXELS

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "a h w b"],
        *,
        scale: Float[Array, " cout"] | None = None,
        shift: Float[Array, " cout"] | None = None,
        residual: Float[Array, "a ho wo b"] | None = None,
        activation: Literal["relu"] | None = None,
    ) -> Float[Array, "a ho wo b"]:
        """Convolves activations in `data_format`; what follows is as in `BlockSparseConv`."""
        size, strides, pads = (
            pair("kernel_size", self.kernel_size),
            pair("strides", self.strides),
            ((self.padding, self.padding),) * 2,
        )
        shape = (*size, x.shape[channel_axis(self.data_format)], self.features)
        blocks = not isinstance(self.get_variable("layouts", "kernel", Dense()), Dense)
        packed = (
            self.has_variable("params", "kernel")
            and self.get_variable("params", "kernel").shape != shape
        )
        if (
            blocks
            or packed
            or not prefers_taps(shape, math.prod(_out(x, size, strides, pads)), self.tap_pixels)
        ):
            return super().__call__(
                x, scale=scale, shift=shift, residual=residual, activation=activation
            )
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        x, kernel = promote_dtype(x, kernel, dtype=self.dtype)
        y = tap_conv(x, kernel, strides=strides, padding=pads, data_format=self.data_format)
        return finish(y, scale, shift, residual, activation, self.data_format)


def prefers_taps(shape: tuple[int, ...], pixels: int, most: int = PIXELS) -> bool:
    """Whether `tap_conv` is the faster dense convolution.

    Args:
      shape: `(kh, kw, cin, cout)`.
      pixels: of the output.
      most: pixels at most.

    Returns:
      True on a CPU, for small images of many channels.

    Reference: measured on 2 cores of a CPU with AVX-512: a training step of VGG-19 is fastest with
    taps up to 4x4 pixels; at inference a few images of 7x7 gain too.
    """
    kh, kw, cin, cout = shape
    return (
        jax.default_backend() == "cpu" and kh * kw > 1 and pixels <= most and cin * cout >= WEIGHTS
    )


def tap_conv(
    x: Float[Array, "a h w b"],
    kernel: Float[Array, "kh kw cin cout"],
    *,
    strides: Pair = (1, 1),
    padding: tuple[Pair, Pair] = ((0, 0), (0, 0)),
    data_format: str = "NHWC",
) -> Float[Array, "a ho wo b"]:
    """`lax.conv_general_dilated` as `y = sum_t kernel[t]^T x_t`; `x_t` are the pixels under tap t,
    those outside the image left out.

    Args:
      x: activations in `data_format`.
      kernel: `[kh, kw, cin, cout]`.
      strides: step in pixels `(y, x)`.
      padding: zeros in pixels `((top, bottom), (left, right))`; they cost nothing.
      data_format: `"NHWC"` or `"CHWN"`.

    Returns:
      Activations in `data_format`, in the dtype of `x`; sums are in float32.

    Example:
      >>> tap_conv(jnp.ones((1, 2, 2, 3)), jnp.ones((3, 3, 3, 4)), padding=((1, 1), (1, 1)))[0, 0, 0].tolist()
      [12.0, 12.0, 12.0, 12.0]
    """
    kh, kw, _, cout = kernel.shape
    native, n = data_format == "CHWN", x.shape[3 if data_format == "CHWN" else 0]
    ho, wo = _out(x, (kh, kw), strides, padding)
    total = jnp.zeros((cout, ho, wo, n) if native else (n, ho, wo, cout), jnp.float32)
    for i, j in itertools.product(range(kh), range(kw)):
        (top, rows, y), (left, columns, x0) = (
            _reach(size, out, tap, pads[0], step)
            for size, out, tap, pads, step in zip(x.shape[1:3], (ho, wo), (i, j), padding, strides)
        )
        if not rows * columns:
            continue
        window = x[
            :,
            y : y + (rows - 1) * strides[0] + 1 : strides[0],
            x0 : x0 + (columns - 1) * strides[1] + 1 : strides[1],
        ]
        operands, axes = (
            ((kernel[i, j], window), ((0,), (0,)))
            if native
            else ((window, kernel[i, j]), ((3,), (0,)))
        )
        product = lax.dot_general(*operands, (axes, ((), ())), preferred_element_type=jnp.float32)
        total += lax.pad(
            product,
            jnp.float32(0),
            ((0, 0, 0), (top, ho - top - rows, 0), (left, wo - left - columns, 0), (0, 0, 0)),
        )
    return total.astype(x.dtype)


def _out(x: jax.Array, kernel: Pair, strides: Pair, padding: tuple[Pair, Pair]) -> list[int]:
    """Height and width of the output."""
    return [
        (size + sum(pads) - k) // step + 1
        for size, pads, k, step in zip(x.shape[1:3], padding, kernel, strides)
    ]


def _reach(size: int, out: int, tap: int, low: int, step: int) -> tuple[int, int, int]:
    """The outputs that a tap feeds from inside the image: the first, how many, and the pixel that
    the first one reads.
    """
    first = max(0, -(-(low - tap) // step))
    last = min(out - 1, (size - 1 + low - tap) // step)
    return first, max(0, last - first + 1), first * step + tap - low
