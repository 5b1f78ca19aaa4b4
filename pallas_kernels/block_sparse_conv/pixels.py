"""Padding, strides and dilation of activations `[c, h, w, n]`, as XLA's operations."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_conv.spec import ConvSpec, Pair


def pad_input(spec: ConvSpec, x: jax.Array) -> jax.Array:
    """Puts the convolution's zeros around x.

    Args:
      spec: the static sizes.
      x: activations in `spec.in_shape`.

    Returns:
      The padded activations.
    """
    edges = [(low, high, 0) for low, high in spec.padding]
    return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *edges, (0, 0, 0)))


def window_size(spec: ConvSpec) -> Pair:
    """Height and width of the window of the padded input that one tap reads, strides included.

    Args:
      spec: the static sizes.

    Returns:
      `(ho - 1) * stride + 1` along each axis.
    """
    height, width = (
        (out - 1) * stride + 1 for out, stride in zip(spec.out_size, spec.strides, strict=True)
    )
    return height, width


def read_pixels(spec: ConvSpec, x: jax.Array) -> jax.Array:
    """The pixels that a 1x1 convolution reads. The transpose of this function is `dilate_output`.

    Args:
      spec: the static sizes of a 1x1 convolution.
      x: activations in `spec.in_shape`.

    Returns:
      Activations with the size of the output, in pixels.
    """
    height, width = window_size(spec)
    return pad_input(spec, x)[:, : height : spec.strides[0], : width : spec.strides[1]]


def dilate_output(spec: ConvSpec, dy: jax.Array) -> jax.Array:
    """Puts `strides - 1` zeros between the pixels of dy, and zeros around them.

    The window of the size of the input that begins at `spec.reach - offset` is then what a tap at
    `offset` contributes to the input gradient.

    Args:
      spec: the static sizes.
      dy: activations with the size of the output, in pixels.

    Returns:
      Activations that are `spec.reach` larger than the input.
    """
    edges = []
    for reach, (low, _), size, out, stride in zip(
        spec.reach, spec.padding, spec.in_size, spec.out_size, spec.strides, strict=True
    ):
        before = reach - low
        after = reach + size - before - (out - 1) * stride - 1
        edges.append((before, after, stride - 1))
    return lax.pad(dy, jnp.zeros((), dy.dtype), ((0, 0, 0), *edges, (0, 0, 0)))
