"""The convolution that the Triton kernels run, and how activations get into its shape.

A 1x1 convolution without strides or padding runs as one row of `h * w * n` images: no tap, no
border, no division. A batch that is no multiple of 16 bytes is padded to one, because rows that
begin anywhere else would be loaded 2 bytes at a time.
"""

import dataclasses

import jax

from pallas_kernels.block_sparse_conv.arithmetic import arithmetic
from pallas_kernels.block_sparse_conv.spec import NO_PADDING, ConvSpec
from pallas_kernels.block_sparse_conv.triton.fitting import itemsize
from pallas_kernels.padding import pad_to, round_up

VECTOR_BYTES = 16


def normal(spec: ConvSpec) -> ConvSpec:
    """The convolution that the kernels run.

    Args:
      spec: the static sizes.

    Returns:
      The same convolution on reshaped and padded activations; its precision is the name of the
      arithmetic.

    Example:
      >>> spec = ConvSpec(cin=8, height=5, width=5, batch=3, kernel=(1, 1), cout=8, groups=2,
      ...                 kept=4, kept_taps=1, group_size=4)
      >>> normal(spec).in_shape
      (8, 1, 1, 76)
    """
    height, width, batch = spec.in_shape[1:]
    if (spec.kernel, spec.strides, spec.padding) == ((1, 1), (1, 1), NO_PADDING):
        height, width, batch = 1, 1, height * width * batch
    return dataclasses.replace(
        spec,
        height=height,
        width=width,
        batch=round_up(batch, VECTOR_BYTES // itemsize(spec)),
        precision=arithmetic(spec),
        relu=False,
        gradients=False,
    )


def computed_spec(spec: ConvSpec, pass_name: str) -> ConvSpec:
    """What a pass computes: the input gradient of a 1x1 convolution leaves out unread pixels.

    Args:
      spec: the static sizes.
      pass_name: one of `PASSES`.

    Returns:
      The static sizes of what the kernels compute, before `normal`.
    """
    if pass_name == "input_gradient":
        return spec.pointwise() or spec
    return spec


def fit(activations: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Brings activations into the shape of the normal convolution.

    Args:
      activations: `[c, h, w, n]`.
      shape: of the normal convolution's input or output.

    Returns:
      The activations, their images padded with zeros.
    """
    if activations.shape[1:3] != shape[1:3]:
        activations = activations.reshape(shape[0], 1, 1, -1)
    return pad_to(activations, (*activations.shape[:3], shape[3]))


def restore(activations: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `fit`.

    Args:
      activations: in the normal convolution's shape.
      shape: of the original.

    Returns:
      Activations in that shape.
    """
    same_pixels = activations.shape[1:3] == shape[1:3]
    images = shape[3] if same_pixels else shape[1] * shape[2] * shape[3]
    return activations[..., :images].reshape(shape)
