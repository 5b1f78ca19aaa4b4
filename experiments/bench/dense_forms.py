"""The dense convolutions that a block-sparse one is compared with, in every activation layout."""

import jax

from pallas_kernels import dense_conv
from pallas_kernels.block_sparse_conv import ConvSpec

# name -> activation layout; "taps" is a matrix product for each tap, the others XLA's convolution
DENSE = {
    "dense NHWC": "NHWC",
    "dense CHWN": "CHWN",
    "dense NCHW": "NCHW",
    "dense taps NHWC": "NHWC",
    "dense taps CHWN": "CHWN",
}
COMMON_DENSE = ("dense NHWC", "dense NCHW")  # what most people have: a baseline of its own


def axes(source: str, target: str) -> tuple[int, ...]:
    """Returns the axes by which a transposition takes one activation layout to another.

    Args:
      source: such as "CHWN".
      target: the same letters in another order.

    Example:
      >>> axes("CHWN", "NHWC")
      (3, 1, 2, 0)
    """
    return tuple(source.index(axis) for axis in target)


def run_dense(spec: ConvSpec, name: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Runs one of the dense convolutions.

    Args:
      spec: strides, padding and dilation.
      name: of `DENSE`.
      x: activations in that layout.
      kernel: `[kh, kw, cin, cout]`.

    Returns:
      Activations in the same layout.
    """
    return dense_conv.dense_conv(
        x,
        kernel,
        strides=spec.strides,
        padding=spec.padding,
        dilation=spec.dilation,
        data_format=DENSE[name],
        formulation="taps" if "taps" in name else "xla",
    )
