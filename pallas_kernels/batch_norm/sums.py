"""Batch norm from sums, cut where a convolution's kernels can compute most of it.

A convolution's output z travels raw, together with its sums over each channel, `sums = (sum z, sum
z^2)`. Who reads z normalises it. So the gradient through the mean and the variance is the gradient
of the sums, and whoever made z adds it: `dz + dsums[0] + 2 z dsums[1]`. Nothing in it is global:
the derivative of every operation reads each activation once.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.batch_norm import formula
from pallas_kernels.batch_norm.formula import Affine, Statistics, add_gradient_of_sums
from pallas_kernels.batch_norm.spec import NormSpec, statistics_dtype
from pallas_kernels.varying import vary_alike


class Norm(NamedTuple):
    """What normalises the channels of an activation.

    Attributes:
      sums: `[2, c]`, the sum of each channel and of its squares.
      scale, bias: `[c]`, the parameters of the batch norm.
    """

    sums: Any
    scale: Any
    bias: Any


def mean_and_variance(sums: Float[Array, "2 c"], count: int) -> Statistics:
    """The statistics of each channel.

    The variance is `E z^2 - (E z)^2`, at least 0, as in Flax (`use_fast_variance`).

    Args:
      sums: of each channel and of its squares.
      count: values of a channel, `h * w * n`.

    Returns:
      Mean and (biased) variance.

    Example:
      >>> mean_and_variance(jnp.array([[6.0], [14.0]]), 3).mean.tolist()
      [2.0]
    """
    mean = sums[0] / count
    return Statistics(mean, jnp.maximum(sums[1] / count - mean**2, 0))


def channel_sums(z: Float[Array, "..."], channel_axis: int = 0) -> Float[Array, "2 c"]:
    """The sums of each channel and of its squares, at least in float32.

    Args:
      z: activations.
      channel_axis: of the channels.

    Returns:
      `[2, c]`.

    Example:
      >>> channel_sums(jnp.array([1.0, 2.0]).reshape(1, 1, 1, 2)).tolist()
      [[3.0], [5.0]]
    """
    wide = z.astype(statistics_dtype(z.dtype))
    axes = formula.other_axes(z, channel_axis)
    return jnp.stack([wide.sum(axes), (wide * wide).sum(axes)])


def count(z: jax.Array, channel_axis: int = 0) -> int:
    """The number of values of a channel.

    Args:
      z: activations.
      channel_axis: of the channels.

    Returns:
      `h * w * n`.

    Example:
      >>> count(jnp.ones((3, 4, 4, 2)))
      32
    """
    return z.size // z.shape[channel_axis]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def with_sums(channel_axis: int, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """An activation and its sums, whose gradient is one pass over memory.

    Args:
      channel_axis: of the channels.
      z: activations.

    Returns:
      z and `channel_sums(z)`.

    Example:
      >>> with_sums(0, jnp.ones((1, 1, 1, 2)))[1].tolist()
      [[2.0], [2.0]]
    """
    return z, channel_sums(z, channel_axis)


def _with_sums_fwd(channel_axis: int, z: jax.Array) -> tuple[Any, jax.Array]:
    return with_sums(channel_axis, z), z


def _with_sums_bwd(channel_axis: int, z: jax.Array, gradients: Any) -> tuple[jax.Array]:
    dz, dsums = gradients
    return (add_gradient_of_sums(dz, dsums, z, channel_axis),)


with_sums.defvjp(_with_sums_fwd, _with_sums_bwd)


def affine(spec: NormSpec, norm: Norm, count: int) -> Affine:
    """A batch norm as a scale and a shift of the activations as they are.

    Args:
      spec: the static arguments.
      norm: sums and parameters.
      count: values of a channel.

    Returns:
      `a = scale / sqrt(variance + epsilon)` and `b = bias - mean a`.

    Example:
      >>> norm = Norm(jnp.array([[4.0], [10.0]]), jnp.array([2.0]), jnp.array([1.0]))
      >>> affine(NormSpec(epsilon=0.0), norm, 2).shift.tolist()
      [-3.0]
    """
    mean, variance = mean_and_variance(norm.sums, count)
    scale = formula.slope(spec, norm.scale, variance)
    return Affine(scale, norm.bias - mean * scale)


def norm_gradient(spec: NormSpec, norm: Norm, count: int, sums: jax.Array) -> Norm:
    """The gradients of a batch norm's sums and parameters.

    With M the count, m the mean and v the variance: `m = sums0 / M` and `v = sums1 / M - m^2`, so
    `dsums1 = dv / M` and `dsums0 = (dm - 2 m dv) / M`.

    Args:
      spec: the static arguments.
      norm: sums and parameters.
      count: values of a channel.
      sums: of the masked gradient, of g and of `g z`.

    Returns:
      The gradients, in the places of what they belong to.

    Example:
      >>> norm = Norm(jnp.array([[4.0], [10.0]]), jnp.array([2.0]), jnp.array([1.0]))
      >>> sums = jnp.array([[1.0], [3.0]])
      >>> norm_gradient(NormSpec(epsilon=0.0), norm, 2, sums).scale.tolist()
      [1.0]
    """
    mean, variance = mean_and_variance(norm.sums, count)
    total, products = sums
    about_mean = jnp.stack([total, products - mean * total])
    gradient = formula.gradient_of_norm(spec, norm.scale, variance, about_mean)
    dmean, dvariance = gradient.statistics
    dsums = jnp.stack([dmean - 2 * mean * dvariance, dvariance]) / count
    return Norm(dsums.astype(norm.sums.dtype), gradient.scale, gradient.bias)


def norm_act_apply(
    spec: NormSpec, z: jax.Array, norm: Norm, shortcut: jax.Array | None = None
) -> jax.Array:
    """`relu(norm(z) + shortcut)`, whose gradient is one pass over memory.

    Args:
      spec: the static arguments.
      z: activations.
      norm: sums and parameters.
      shortcut: in the shape of z, or None.

    Returns:
      Activations in the dtype of z.

    Example:
      >>> z = jnp.array([1.0, 3.0]).reshape(1, 1, 1, 2)
      >>> norm = Norm(channel_sums(z), jnp.ones(1), jnp.zeros(1))
      >>> norm_act_apply(NormSpec(epsilon=0.0), z, norm).ravel().tolist()
      [0.0, 1.0]
    """
    return _norm_act_apply(spec, *vary_alike((z, norm, shortcut)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm_act_apply(
    spec: NormSpec, z: jax.Array, norm: Norm, shortcut: jax.Array | None
) -> jax.Array:
    scales = affine(spec, norm, count(z, spec.channel_axis))
    return formula.apply(spec, scales, z, shortcut)


def _norm_act_apply_fwd(
    spec: NormSpec, z: jax.Array, norm: Norm, shortcut: jax.Array | None
) -> tuple[jax.Array, Any]:
    x = _norm_act_apply(spec, z, norm, shortcut)
    return x, (z, norm, None if shortcut is None else x)


def _norm_act_apply_bwd(spec: NormSpec, residuals: Any, dx: jax.Array) -> tuple[Any, ...]:
    z, norm, joined = residuals
    values = count(z, spec.channel_axis)
    masked = formula.masked_gradient(spec, affine(spec, norm, values), dx, z, joined)
    return masked.dz, norm_gradient(spec, norm, values, masked.sums), masked.g


_norm_act_apply.defvjp(_norm_act_apply_fwd, _norm_act_apply_bwd)
