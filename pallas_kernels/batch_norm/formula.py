"""The formula of batch norm and its gradient: XLA's operations, and what the kernels compute too.

`x = relu(scale * z + shift + shortcut)`, with one scale and one shift for each channel. The scale
is `gamma / sqrt(variance + epsilon)`. With the activations as they are, the shift is `beta - mean *
scale`, so that a kernel multiplies once and adds once. With the activations about their mean, it is
`beta`, and nothing cancels where the mean is far from zero.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.batch_norm.spec import NormSpec, statistics_dtype


class Affine(NamedTuple):
    """A batch norm as one multiplication and one addition: `scale * z + shift`, each `[c]`."""

    scale: jax.Array
    shift: jax.Array


class Statistics(NamedTuple):
    """The mean and the biased variance of each channel, `[c]` each."""

    mean: jax.Array
    variance: jax.Array


def slope(spec: NormSpec, scale: jax.Array, variance: jax.Array) -> jax.Array:
    """The factor of each channel, `scale / sqrt(variance + epsilon)`.

    Args:
      spec: the static arguments.
      scale: `[c]`, the parameter.
      variance: `[c]`.

    Returns:
      `[c]`.

    Example:
      >>> slope(NormSpec(epsilon=0.0), jnp.ones(1), jnp.array([4.0])).tolist()
      [0.5]
    """
    return scale * lax.rsqrt(variance + spec.epsilon)


def apply(spec: NormSpec, affine: Affine, z: jax.Array, shortcut: jax.Array | None) -> jax.Array:
    """`relu(scale * z + shift + shortcut)`, computed in float32 and rounded once.

    Args:
      spec: the static arguments.
      affine: scale and shift of each channel.
      z: activations.
      shortcut: in the shape of z, or None.

    Returns:
      Activations in the dtype of z.

    Example:
      >>> z = jnp.array([1.0, -1.0]).reshape(1, 1, 1, 2)
      >>> double = Affine(jnp.array([2.0]), jnp.array([1.0]))
      >>> apply(NormSpec(), double, z, None).ravel().tolist()
      [3.0, 0.0]
    """
    x = _normalised(spec, affine, z)
    if shortcut is not None:
        x += shortcut.astype(x.dtype)
    return (jax.nn.relu(x) if spec.relu else x).astype(z.dtype)


class MaskedGradient(NamedTuple):
    """The gradient of `relu(scale * z + shift + shortcut)` for scale and shift held fixed.

    Attributes:
      dz: the gradient with respect to z.
      sums: `[2, c]`, the sums of g and of `g z` over each channel, g being the gradient before the
        ReLU.
      g: the shortcut's gradient, or None.
    """

    dz: jax.Array
    sums: jax.Array
    g: jax.Array | None


def masked_gradient(
    spec: NormSpec,
    affine: Affine,
    dx: jax.Array,
    z: jax.Array,
    joined: jax.Array | None = None,
) -> MaskedGradient:
    """The gradient of `apply`.

    Args:
      spec: the static arguments.
      affine: scale and shift of each channel.
      dx: the gradient with respect to the result.
      z: the activations that were normalised.
      joined: the result, where a shortcut was added; it says where the ReLU let pass.

    Returns:
      The gradients.

    Example:
      >>> z = jnp.array([1.0, -1.0]).reshape(1, 1, 1, 2)
      >>> one = Affine(jnp.array([2.0]), jnp.array([1.0]))
      >>> masked_gradient(NormSpec(), one, jnp.ones_like(z), z).dz.ravel().tolist()
      [2.0, 0.0]
    """
    axis, wide_z = spec.channel_axis, z.astype(statistics_dtype(z.dtype))
    g = dx.astype(wide_z.dtype)
    if spec.relu:
        passes = (_normalised(spec, affine, z) if joined is None else joined) > 0
        g = jnp.where(passes, g, 0)
    axes = other_axes(z, axis)
    return MaskedGradient(
        dz=(per_channel(affine.scale, z, axis) * g).astype(z.dtype),
        sums=jnp.stack([g.sum(axes), (g * wide_z).sum(axes)]),
        g=None if joined is None else g.astype(joined.dtype),
    )


class NormGradient(NamedTuple):
    """The gradients of what makes an `Affine`: the statistics, and the parameters `[c]`."""

    statistics: Statistics
    scale: jax.Array
    bias: jax.Array


def gradient_of_norm(
    spec: NormSpec, scale: jax.Array, variance: jax.Array, sums: jax.Array
) -> NormGradient:
    """The gradients of the statistics and the parameters.

    With `r = 1 / sqrt(variance + epsilon)` and S the sums of the gradient: `dbias = S0`, `dscale =
    r S1`, `dmean = -scale r S0` and `dvariance = -scale r^3 S1 / 2`.

    Args:
      spec: the static arguments.
      scale: `[c]`, the parameter.
      variance: `[c]`.
      sums: of the masked gradient, about the mean: of g and of `g (z - mean)`.

    Returns:
      The gradients; that of a variance of 0, which may stand for a small negative one, is 0.

    Example:
      >>> sums = jnp.array([[1.0], [3.0]])
      >>> gradient_of_norm(NormSpec(epsilon=0.0), jnp.ones(1), jnp.ones(1), sums).scale.tolist()
      [3.0]
    """
    root = lax.rsqrt(variance + spec.epsilon)
    total, products = sums
    dmean = -scale * root * total
    dvariance = jnp.where(variance > 0, -0.5 * scale * root**3 * products, 0)
    return NormGradient(Statistics(dmean, dvariance), products * root, total)


def add_gradient_of_sums(
    dz: jax.Array, dsums: jax.Array, z: jax.Array, channel_axis: int = 0
) -> jax.Array:
    """The whole gradient of an activation whose sums, or sums of squares, were used too.

    Args:
      dz: the gradient with respect to z.
      dsums: `[2, c]`, with respect to the sums of z and of its squares.
      z: the activation.
      channel_axis: of the channels.

    Returns:
      `dz + dsums[0] + 2 z dsums[1]`, rounded once.

    Example:
      >>> one = jnp.ones((1, 1, 1, 1))
      >>> add_gradient_of_sums(one, jnp.array([[1.0], [2.0]]), 3 * one).tolist()
      [[[[14.0]]]]
    """
    wide = z.astype(statistics_dtype(z.dtype))
    first, second = (per_channel(row, z, channel_axis) for row in dsums)
    return (dz.astype(wide.dtype) + first + 2 * second * wide).astype(z.dtype)


def per_channel(numbers: jax.Array, z: jax.Array, channel_axis: int) -> jax.Array:
    """One number for each channel, in a shape that broadcasts with activations.

    Args:
      numbers: `[c]`.
      z: the activations.
      channel_axis: of the channels in z.

    Returns:
      The numbers, with an axis of size 1 for each other axis of z.

    Example:
      >>> per_channel(jnp.ones(3), jnp.ones((3, 4, 4, 2)), 0).shape
      (3, 1, 1, 1)
    """
    return jnp.expand_dims(numbers, other_axes(z, channel_axis))


def other_axes(z: jax.Array, channel_axis: int) -> tuple[int, ...]:
    """The axes of activations but that of the channels."""
    return tuple(axis for axis in range(z.ndim) if axis != channel_axis % z.ndim)


def _normalised(spec: NormSpec, affine: Affine, z: jax.Array) -> jax.Array:
    scale, shift = (per_channel(numbers, z, spec.channel_axis) for numbers in affine)
    return scale * z.astype(statistics_dtype(z.dtype)) + shift
