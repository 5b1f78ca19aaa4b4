"""Batch norm of activations in XLA's operations: any axis, any platform.

The activations enter the formula about their mean. The derivatives of the native kernels are those
of these functions.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.batch_norm import formula
from pallas_kernels.batch_norm.formula import Affine, Statistics
from pallas_kernels.batch_norm.spec import NormSpec, statistics_dtype
from pallas_kernels.batch_norm.sums import channel_sums, count, mean_and_variance


def forward(
    spec: NormSpec,
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    residual: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The operation with its statistics.

    Args:
      spec: the static arguments.
      x: activations.
      scale, bias: one number for each channel.
      residual: as x, or None.

    Returns:
      `(y, mean, variance)`.
    """
    mean, variance = statistics(spec, x)
    affine = Affine(formula.slope(spec, scale, variance), bias)
    y = formula.apply(spec, affine, _about_mean(spec, x, mean), residual)
    return y.astype(x.dtype), mean, variance


def statistics(spec: NormSpec, x: jax.Array) -> Statistics:
    """The mean and the biased variance of each channel, in float32 at least.

    Args:
      spec: the static arguments.
      x: activations.

    Returns:
      `[channels]` each.
    """

    def over_devices(means: jax.Array) -> jax.Array:
        if spec.axis_name is None:
            return means
        return lax.pmean(means, spec.axis_name, axis_index_groups=spec.axis_index_groups)

    values, axes = count(x, spec.channel_axis), formula.other_axes(x, spec.channel_axis)
    if spec.fast_variance:
        return mean_and_variance(over_devices(channel_sums(x, spec.channel_axis)), values)
    mean = over_devices(x.astype(statistics_dtype(x.dtype)).mean(axes))
    return Statistics(mean, over_devices(lax.square(_about_mean(spec, x, mean)).mean(axes)))


def backward(
    spec: NormSpec,
    dy: jax.Array,
    more: jax.Array | None,
    x: jax.Array,
    y: jax.Array | None,
    scale: jax.Array,
    bias: jax.Array,
    mean: jax.Array,
    variance: jax.Array,
    dmean: jax.Array,
    dvariance: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """The gradients, from the statistics of the forward pass.

    Args:
      spec: the static arguments.
      dy: of the output.
      more: is added to dy; may be None.
      x: activations.
      y: the output; None: its sign is computed again.
      scale, bias: one number for each channel.
      mean, variance: of the forward pass.
      dmean, dvariance: of the statistics.

    Returns:
      `(dx, dscale, dbias, g)`; g is None where y is.
    """
    wide = statistics_dtype(x.dtype)
    centred = _about_mean(spec, x, mean)
    affine = Affine(formula.slope(spec, scale, variance), bias)
    dy = dy.astype(wide) if more is None else dy.astype(wide) + more.astype(wide)
    dx, sums, g = formula.masked_gradient(spec, affine, dy, centred, y)
    gradient = formula.gradient_of_norm(spec, scale, variance, sums)
    through_mean, through_variance = gradient.statistics
    dsums = jnp.stack([dmean + through_mean, dvariance + through_variance])
    dx = formula.add_gradient_of_sums(
        dx, dsums / count(x, spec.channel_axis), centred, spec.channel_axis
    )
    return dx.astype(x.dtype), gradient.scale, gradient.bias, g


def _about_mean(spec: NormSpec, x: jax.Array, mean: jax.Array) -> jax.Array:
    return x.astype(mean.dtype) - formula.per_channel(mean, x, spec.channel_axis)
