"""The passes between batch norms, made of a convolution's plain passes and XLA's operations."""

import dataclasses
from typing import Any

import jax

from pallas_kernels import batch_norm
from pallas_kernels.batch_norm import Affine, NormSpec
from pallas_kernels.block_sparse_conv.spec import ConvSpec, Pass


def forward_with_sums(forward: Pass, spec: ConvSpec, *operands: Any) -> tuple[jax.Array, jax.Array]:
    """The forward pass, and the sums of its result over each channel.

    Args:
      forward: the forward pass.
      spec: the static sizes.
      *operands: as of `normalised`.

    Returns:
      As `Implementation.forward_with_sums`.
    """
    operands = normalised(spec, *operands)
    y = forward(dataclasses.replace(spec, relu=False), *operands)
    return y, batch_norm.channel_sums(y)


def normalised(
    spec: ConvSpec,
    x: jax.Array,
    other: jax.Array,
    filters: jax.Array,
    channels: jax.Array,
    taps: jax.Array,
    scale: jax.Array | None = None,
    shift: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """The operands of a pass, with the normalised input in place of a raw one.

    Args:
      spec: the static sizes; `relu`: whether the norm of the input ends in one.
      x: the input.
      other: the pass's second operand.
      filters, channels, taps: of the convolution.
      scale, shift: of each channel; None where x is not raw.

    Returns:
      The operands without scale and shift.
    """
    if scale is not None and shift is not None:
        x = batch_norm.apply(NormSpec(spec.relu), Affine(scale, shift), x, None)
    return x, other, filters, channels, taps


def norm_input_gradient(
    input_gradient: Pass,
    spec: ConvSpec,
    dy: jax.Array,
    values: jax.Array,
    filters: jax.Array,
    channels: jax.Array,
    taps: jax.Array,
    z: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
    joined: jax.Array | None = None,
    more: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """The input gradient, masked, scaled and summed over each channel.

    Args:
      input_gradient: the plain pass.
      spec: the static sizes; `relu`: whether the norm of the input ends in one.
      dy: the gradient with respect to y.
      values, filters, channels, taps: of the convolution.
      z: the activations that were normalised.
      scale, shift: of each channel.
      joined: x, where a shortcut was added.
      more: another gradient with respect to x, or None.

    Returns:
      As `Implementation.norm_input_gradient`.
    """
    dx = input_gradient(spec, dy, values, filters, channels, taps)
    if more is not None:
        dx = dx.astype(scale.dtype) + more.astype(scale.dtype)
    norm_spec = NormSpec(relu=spec.relu)
    masked = batch_norm.masked_gradient(norm_spec, Affine(scale, shift), dx, z, joined)
    return masked[:2] if masked.g is None else (*masked[:2], masked.g)
