"""Batch norm, a residual and a ReLU in XLA's operations: any axis, any platform.

The derivatives of the native kernels are those of these functions.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.norm_act.spec import NormSpec, statistics_dtype


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
    slope = scale * lax.rsqrt(variance + spec.epsilon)
    wide = x.astype(mean.dtype)
    y = (wide - _rows(spec, mean, x)) * _rows(spec, slope, x) + _rows(spec, bias, x)
    if residual is not None:
        y += residual.astype(y.dtype)
    return (jax.nn.relu(y) if spec.relu else y).astype(x.dtype), mean, variance


def statistics(spec: NormSpec, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mean and the biased variance of each channel, in float32 at least.

    Args:
      spec: the static arguments.
      x: activations.

    Returns:
      `(mean, variance)`, `[channels]` each.
    """
    axes = tuple(axis for axis in range(x.ndim) if axis != spec.channel_axis)
    wide = x.astype(statistics_dtype(x.dtype))

    def over_devices(means: Any) -> Any:
        if spec.axis_name is None:
            return means
        return lax.pmean(means, spec.axis_name, axis_index_groups=spec.axis_index_groups)

    if spec.fast_variance:
        mean, square = over_devices((wide.mean(axes), lax.square(wide).mean(axes)))
        return mean, jnp.maximum(0.0, square - lax.square(mean))
    mean = over_devices(wide.mean(axes))
    return mean, over_devices(lax.square(wide - _rows(spec, mean, x)).mean(axes))


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

    With `g = dy where y > 0`, `d = x - mean` and `r = 1 / sqrt(variance + epsilon)`: `dbias = sum
    g`, `dscale = r sum g d` and `dx = scale r (g - mean(g) - d r^2 mean(g d)) + (dmean + 2 d
    dvariance) / count`.

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
    axes = tuple(axis for axis in range(x.ndim) if axis != spec.channel_axis)
    count = x.size // x.shape[spec.channel_axis]
    inverse = lax.rsqrt(variance + spec.epsilon)
    slope = scale * inverse
    d = x.astype(mean.dtype) - _rows(spec, mean, x)
    g = dy if more is None else dy + more
    if spec.relu:
        is_positive = y > 0 if y is not None else _is_positive(spec, d, slope, bias)
        g = jnp.where(is_positive, g, 0)
    wide = g.astype(mean.dtype)
    dbias, products = wide.sum(axes), (wide * d).sum(axes)
    through_mean = (dmean - slope * dbias) / count
    through_variance = (2 * dvariance - slope * lax.square(inverse) * products) / count
    dx = wide * _rows(spec, slope, x) + d * _rows(spec, through_variance, x)
    dx += _rows(spec, through_mean, x)
    return dx.astype(x.dtype), products * inverse, dbias, None if y is None else g


def _is_positive(spec: NormSpec, d: jax.Array, slope: jax.Array, bias: jax.Array) -> jax.Array:
    return d * _rows(spec, slope, d) + _rows(spec, bias, d) > 0


def _rows(spec: NormSpec, array: jax.Array, x: jax.Array) -> jax.Array:
    """One number for each channel, in the rank of x."""
    return jnp.expand_dims(array, [axis for axis in range(x.ndim) if axis != spec.channel_axis])
