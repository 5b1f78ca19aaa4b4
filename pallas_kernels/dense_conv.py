"""The dense convolution, in three formulations that compute the same numbers.

- "xla": `lax.conv_general_dilated`.
- "rows": one matrix product with the shifted rows of the input. XLA's convolution on a CPU runs in
  NHWC and would transpose CHWN activations; this one does not. It costs the memory of the rows, so
  it is chosen where they are few.
- "taps": a sum over the kernel's taps, one matrix product each. XLA's convolution on a CPU (jax
  0.10) takes twice as long at 512 channels of 4x4 pixels, and 40 times as long at 2x2 pixels.
"""

import contextlib
import contextvars
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.sharding import CONVOLUTION, over_images

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]

FORMULATIONS = ("xla", "rows", "taps")
TAP_PIXELS = 16
"""The largest output, in pixels, for which "taps" is chosen. Measured on 2 cores of a CPU with
AVX-512: a training step of VGG-19 is fastest with taps up to 4x4 pixels."""
TAP_WEIGHTS = 128 * 256
"""The fewest weights of one tap, `cin * cout`, for which "taps" is chosen; measured likewise."""
_tap_pixels = contextvars.ContextVar("tap_pixels", default=TAP_PIXELS)


def dense_conv(
    x: Float[Array, "a h w b"],
    kernel: Float[Array, "kh kw cin cout"],
    *,
    strides: Pair = (1, 1),
    padding: Padding = ((0, 0), (0, 0)),
    dilation: Pair = (1, 1),
    data_format: str = "NHWC",
    feature_group_count: int = 1,
    precision: Any = None,
    formulation: str | None = None,
) -> Float[Array, "c ho wo d"]:
    """Convolves with a dense conv kernel.

    Args:
      x: activations in `data_format`.
      kernel: `[kh, kw, cin / feature_group_count, cout]`, in the dtype of x.
      strides: step in pixels `(y, x)`.
      padding: zeros around the image in pixels `((top, bottom), (left, right))`.
      dilation: distance between taps in pixels `(y, x)`.
      data_format: "NHWC" or "CHWN", of the input and the output; the formulation "xla" also takes
        "NCHW".
      feature_group_count: groups of a grouped (depthwise) convolution.
      precision: as in `jax.lax.conv_general_dilated`.
      formulation: one of `FORMULATIONS`; None: see `choose_formulation`.

    Returns:
      Activations in `data_format`, in the dtype of x.

    Raises:
      ValueError: the formulation is unknown or does not run this convolution.

    Example:
      >>> x, kernel, edge = jnp.ones((1, 2, 2, 3)), jnp.ones((3, 3, 3, 4)), ((1, 1), (1, 1))
      >>> dense_conv(x, kernel, padding=edge, formulation="xla")[0, 0, 0].tolist()
      [12.0, 12.0, 12.0, 12.0]
      >>> dense_conv(x, kernel, padding=edge, formulation="taps")[0, 0, 0].tolist()
      [12.0, 12.0, 12.0, 12.0]
    """
    if formulation is None:
        out_size = output_size(x, kernel.shape, strides, padding, dilation, data_format)
        formulation = choose_formulation(
            kernel.shape, math.prod(out_size), data_format, feature_group_count
        )
    if formulation not in FORMULATIONS:
        raise ValueError(
            f"formulation: expected None or one of {', '.join(map(repr, FORMULATIONS))}, got "
            f"{formulation!r}"
        )
    if formulation == "xla":
        return xla_conv(
            x, kernel, strides, padding, dilation, data_format, feature_group_count, precision
        )
    data_formats = ("CHWN",) if formulation == "rows" else ("NHWC", "CHWN")
    if data_format not in data_formats or feature_group_count != 1:
        raise ValueError(
            f"formulation: {formulation!r} runs in {' and '.join(data_formats)} with "
            f"feature_group_count=1, got data_format={data_format!r} and "
            f"feature_group_count={feature_group_count}; use 'xla'"
        )

    def products(x: jax.Array, kernel: jax.Array) -> jax.Array:
        if formulation == "rows":
            return _row_conv(x, kernel, strides, padding, dilation, precision)
        return tap_conv(x, kernel, strides, padding, dilation, data_format, precision)

    of_x, of_kernel, of_y = CONVOLUTION[data_format]
    return over_images(products, (of_x, of_kernel), of_y, xla=True)(x, kernel)


def choose_formulation(
    kernel_shape: Sequence[int], out_pixels: int, data_format: str, feature_group_count: int = 1
) -> str:
    """The formulation that `dense_conv` picks.

    - "taps" on a CPU, for small images of many channels: at most `TAP_PIXELS` output pixels (see
      `taps_up_to`) and at least `TAP_WEIGHTS` weights for each tap of a kernel larger than 1x1.
    - "rows" in CHWN, for 1x1 kernels, and on a CPU where the rows take at most twice the memory of
      the output (a stem of 3 channels).
    - "xla" everywhere else.

    Args:
      kernel_shape: `(kh, kw, cin, cout)`.
      out_pixels: height times width of the output.
      data_format: of the activations.
      feature_group_count: groups of a grouped convolution.

    Returns:
      One of `FORMULATIONS`.

    Example:
      >>> [choose_formulation((1, 1, cin, 64), 32 * 32, "CHWN") for cin in (3, 64)]
      ['rows', 'rows']
    """
    kh, kw, cin, cout = kernel_shape
    if feature_group_count != 1 or not isinstance(out_pixels, int) or out_pixels < 1:
        return "xla"
    if kh * kw == 1:
        return "rows" if data_format == "CHWN" else "xla"
    if jax.default_backend() != "cpu":
        return "xla"
    is_small = out_pixels <= _tap_pixels.get() and cin * cout >= TAP_WEIGHTS
    if is_small and data_format != "NCHW":
        return "taps"
    return "rows" if data_format == "CHWN" and kh * kw * cin <= 2 * cout else "xla"


@contextlib.contextmanager
def taps_up_to(pixels: int) -> Iterator[None]:
    """Inside this context, "taps" is chosen for outputs of up to so many pixels.

    For benchmarks: at inference a few images of 7x7 pixels gain too. The choice is made while a
    convolution is traced, so trace (call, or lower) inside the context; what was compiled before
    stays as it is. Other threads keep their own setting.

    Args:
      pixels: of the output; 0: never.

    Yields:
      Nothing.

    Example:
      >>> with taps_up_to(49):
      ...     inside = choose_formulation((3, 3, 512, 512), 49, "NHWC")
      >>> inside == ("taps" if jax.default_backend() == "cpu" else "xla")
      True
      >>> choose_formulation((3, 3, 512, 512), 49, "NHWC")
      'xla'
    """
    token = _tap_pixels.set(pixels)
    try:
        yield
    finally:
        _tap_pixels.reset(token)


def output_size(
    x: Any,
    kernel_shape: Sequence[int],
    strides: Pair,
    padding: Padding,
    dilation: Pair,
    data_format: str,
) -> Pair:
    """Height and width of a convolution's output in pixels.

    Args:
      x: the input, or anything with its shape.
      kernel_shape: `(kh, kw, cin, cout)`.
      strides, padding, dilation, data_format: as in `dense_conv`.

    Returns:
      `(ho, wo)`; below 1 where the kernel does not fit.

    Example:
      >>> x = jnp.ones((1, 5, 4, 3))
      >>> output_size(x, (3, 3, 3, 8), (2, 1), ((1, 1), (0, 0)), (1, 1), "NHWC")
      (3, 2)
    """
    first = data_format.index("H")
    sizes = x.shape[first : first + 2]
    height, width = (
        (size + sum(pads) - (taps - 1) * step - 1) // stride + 1
        for size, pads, taps, step, stride in zip(
            sizes, padding, kernel_shape[:2], dilation, strides, strict=True
        )
    )
    return height, width


def xla_conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: Pair,
    padding: Padding,
    dilation: Pair,
    data_format: str,
    feature_group_count: int = 1,
    precision: Any = None,
) -> jax.Array:
    """`lax.conv_general_dilated`, with the padding beyond the kernel's reach added to x itself.

    Where the padding is wider than the kernel's reach, XLA's input gradient on a CPU (jax 0.10.2)
    reads memory that nobody wrote.
    """
    beyond = [
        tuple(max(0, pad - (taps - 1) * step) for pad in pads)
        for pads, taps, step in zip(padding, kernel.shape[:2], dilation, strict=True)
    ]
    if any(map(any, beyond)):
        edges = [(0, 0)] * 4
        first = data_format.index("H")
        edges[first : first + 2] = beyond  # type: ignore[assignment]
        x = jnp.pad(x, edges)
        (top, bottom), (left, right) = (
            (low - extra_low, high - extra_high)
            for (low, high), (extra_low, extra_high) in zip(padding, beyond, strict=True)
        )
        padding = ((top, bottom), (left, right))
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=(data_format, "HWIO", data_format),
        feature_group_count=feature_group_count,
        precision=precision,
    )


def _row_conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: Pair,
    padding: Padding,
    dilation: Pair,
    precision: Any,
) -> jax.Array:
    """`kernel^T` times the shifted rows `[kh * kw * cin, ...]`, in CHWN."""
    kh, kw, _, cout = kernel.shape
    height, width = output_size(x, kernel.shape, strides, padding, dilation, "CHWN")
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    shifted = []
    for tap_y, tap_x in itertools.product(range(kh), range(kw)):
        top, left = tap_y * dilation[0], tap_x * dilation[1]
        bottom = top + (height - 1) * strides[0] + 1
        right = left + (width - 1) * strides[1] + 1
        shifted.append(x[:, top : bottom : strides[0], left : right : strides[1]])
    rows = jnp.concatenate(shifted)
    if jax.device_count() == 1:  # with more, images and pixels on one axis would be gathered
        rows = rows.reshape(rows.shape[0], -1)  # XLA's weight gradient is twice as fast
    contract_rows = (((0,), (0,)), ((), ()))
    y = lax.dot_general(kernel.reshape(-1, cout), rows, contract_rows, precision=precision)
    return y.reshape(cout, height, width, -1)


def tap_conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: Pair,
    padding: Padding,
    dilation: Pair,
    data_format: str,
    precision: Any = None,
) -> jax.Array:
    """`y = sum_t kernel[t]^T x_t` in float32, `x_t` being the pixels under tap t.

    Pixels outside the image are left out, so padding costs nothing.
    """
    kh, kw, _, cout = kernel.shape
    height, width = output_size(x, kernel.shape, strides, padding, dilation, data_format)
    if data_format == "CHWN":
        total = jnp.zeros((cout, height, width, x.shape[3]), jnp.float32)
    else:
        total = jnp.zeros((x.shape[0], height, width, cout), jnp.float32)
    for tap_y, tap_x in itertools.product(range(kh), range(kw)):
        y_range = _inside(x.shape[1], height, tap_y * dilation[0], padding[0][0], strides[0])
        x_range = _inside(x.shape[2], width, tap_x * dilation[1], padding[1][0], strides[1])
        if not y_range.length * x_range.length:
            continue
        window = x[:, y_range.source(strides[0]), x_range.source(strides[1])]
        weights = kernel[tap_y, tap_x]
        if data_format == "CHWN":
            left, right, axes = weights, window, ((0,), (0,))
        else:
            left, right, axes = window, weights, ((3,), (0,))
        product = lax.dot_general(
            left,
            right,
            (axes, ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        edges = ((0, 0, 0), y_range.edges(height), x_range.edges(width), (0, 0, 0))
        total += lax.pad(product, jnp.float32(0), edges)
    return total.astype(x.dtype)


class _Range(NamedTuple):
    """Along one axis: the outputs to which a tap contributes pixels from inside the image.

    Attributes:
      first: the first of these outputs.
      length: how many there are.
      pixel: the input pixel that the first one reads.
    """

    first: int
    length: int
    pixel: int

    def source(self, stride: int) -> slice:
        """The input pixels that they read."""
        return slice(self.pixel, self.pixel + (self.length - 1) * stride + 1, stride)

    def edges(self, size: int) -> tuple[int, int, int]:
        """The padding, as in `lax.pad`, that makes an output of this size of them."""
        return self.first, size - self.first - self.length, 0


def _inside(size: int, out: int, offset: int, padding: int, stride: int) -> _Range:
    """The range of a tap whose first output reads the pixel `offset - padding`."""
    first = max(0, -(-(padding - offset) // stride))
    last = min(out - 1, (size - 1 + padding - offset) // stride)
    return _Range(first, max(0, last - first + 1), first * stride + offset - padding)
