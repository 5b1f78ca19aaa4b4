"""Batch norm in training, cut where a convolution's kernels can compute most of it.

A convolution's output z travels raw, together with its sums over each channel, `sums = (sum z, sum
z^2)`. Who reads z normalises it: `x = relu(a z + b + shortcut)`, with `a = scale / sqrt(variance +
epsilon)` and `b = bias - mean a` computed from the sums. So the gradient through the mean and the
variance is the gradient of the sums, and whoever made z adds it: `dz + dsums[0] + 2 z dsums[1]`.
Nothing in it is global: the derivative of every operation reads each activation once.

These are XLA's operations, for every backend; the kernels that do more compute the same. Where the
activations are read anyway, as on CPUs, `norm_act/` takes the statistics from them.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

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


class NormSettings(NamedTuple):
    """The static part of `x = relu(norm(z) + shortcut)`.

    Attributes:
      relu: whether a ReLU ends it.
      epsilon: added to the variance.
      channel_axis: of the channels in z.
    """

    relu: bool = True
    epsilon: float = 1e-5
    channel_axis: int = 0


class Affine(NamedTuple):
    """A batch norm as one multiplication and one addition: `scale * z + shift`, each `[c]`."""

    scale: jax.Array
    shift: jax.Array


def mean_and_variance(
    sums: Float[Array, "2 c"], count: int
) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
    """The statistics of each channel.

    The variance is `E z^2 - (E z)^2`, at least 0, as in Flax (`use_fast_variance`).

    Args:
      sums: of each channel and of its squares.
      count: values of a channel, `h * w * n`.

    Returns:
      Mean and (biased) variance.

    Example:
      >>> mean_and_variance(jnp.array([[6.0], [14.0]]), 3)[0].tolist()
      [2.0]
    """
    mean = sums[0] / count
    return mean, jnp.maximum(sums[1] / count - mean**2, 0)


def channel_sums(z: Float[Array, "a b c d"], channel_axis: int = 0) -> Float[Array, "2 c"]:
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
    wide = z.astype(_wide(z))
    axes = _other_axes(z, channel_axis)
    return jnp.stack([wide.sum(axes), (wide * wide).sum(axes)])


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


def add_gradient_of_sums(
    dz: jax.Array, dsums: jax.Array, z: jax.Array, channel_axis: int = 0
) -> jax.Array:
    """The whole gradient of an activation that left with its sums.

    Args:
      dz: the gradient with respect to z.
      dsums: with respect to its sums.
      z: the activation.
      channel_axis: of the channels.

    Returns:
      `dz + dsums[0] + 2 z dsums[1]`, rounded once.

    Example:
      >>> one = jnp.ones((1, 1, 1, 1))
      >>> add_gradient_of_sums(one, jnp.array([[1.0], [2.0]]), 3 * one).tolist()
      [[[[14.0]]]]
    """
    first, second = (per_channel(row, channel_axis) for row in dsums)
    return (dz.astype(_wide(z)) + first + 2 * second * z.astype(_wide(z))).astype(z.dtype)


def affine(settings: NormSettings, norm: Norm, count: int) -> Affine:
    """A batch norm as a scale and a shift.

    Args:
      settings: the static part.
      norm: sums and parameters.
      count: values of a channel.

    Returns:
      `a = scale / sqrt(variance + epsilon)` and `b = bias - mean a`.

    Example:
      >>> norm = Norm(jnp.array([[4.0], [10.0]]), jnp.array([2.0]), jnp.array([1.0]))
      >>> affine(NormSettings(epsilon=0.0), norm, 2).shift.tolist()
      [-3.0]
    """
    mean, variance = mean_and_variance(norm.sums, count)
    scale = norm.scale * lax.rsqrt(variance + settings.epsilon)
    return Affine(scale, norm.bias - mean * scale)


def apply(
    settings: NormSettings, affine: Affine, z: jax.Array, shortcut: jax.Array | None
) -> jax.Array:
    """`relu(scale * z + shift + shortcut)`, computed in float32 and rounded once.

    Args:
      settings: the static part.
      affine: scale and shift of each channel.
      z: activations.
      shortcut: in the shape of z, or None.

    Returns:
      Activations in the dtype of z.

    Example:
      >>> z = jnp.array([1.0, -1.0]).reshape(1, 1, 1, 2)
      >>> double = Affine(jnp.array([2.0]), jnp.array([1.0]))
      >>> apply(NormSettings(), double, z, None).ravel().tolist()
      [3.0, 0.0]
    """
    x = _normalised(settings, affine, z)
    if shortcut is not None:
        x += shortcut.astype(x.dtype)
    return (jax.nn.relu(x) if settings.relu else x).astype(z.dtype)


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
    settings: NormSettings,
    affine: Affine,
    dx: jax.Array,
    z: jax.Array,
    joined: jax.Array | None = None,
) -> MaskedGradient:
    """The gradient of `apply`.

    Args:
      settings: the static part.
      affine: scale and shift of each channel.
      dx: the gradient with respect to the result.
      z: the activations that were normalised.
      joined: the result, where a shortcut was added; it says where the ReLU let pass.

    Returns:
      The gradients.

    Example:
      >>> z = jnp.array([1.0, -1.0]).reshape(1, 1, 1, 2)
      >>> one = Affine(jnp.array([2.0]), jnp.array([1.0]))
      >>> masked_gradient(NormSettings(), one, jnp.ones_like(z), z).dz.ravel().tolist()
      [2.0, 0.0]
    """
    axis, wide_z = settings.channel_axis, z.astype(_wide(z))
    g = dx.astype(_wide(z))
    if settings.relu:
        passes = (_normalised(settings, affine, z) if joined is None else joined) > 0
        g = jnp.where(passes, g, 0)
    axes = _other_axes(z, axis)
    return MaskedGradient(
        dz=(per_channel(affine.scale, axis) * g).astype(z.dtype),
        sums=jnp.stack([g.sum(axes), (g * wide_z).sum(axes)]),
        g=None if joined is None else g.astype(joined.dtype),
    )


def norm_gradient(settings: NormSettings, norm: Norm, count: int, sums: jax.Array) -> Norm:
    """The gradients of a batch norm's sums and parameters.

    With m the mean, v the variance, `r = 1 / sqrt(v + epsilon)`, S the gradient's sums and M the
    count: `dbias = S0`, `dscale = (S1 - m S0) r`, `dm = -scale r S0`, `dv = -scale r^3 (S1 - m S0)
    / 2`; and since `m = sums0 / M` and `v = sums1 / M - m^2`, `dsums1 = dv / M` and `dsums0 = (dm -
    2 m dv) / M`.

    Args:
      settings: the static part.
      norm: sums and parameters.
      count: values of a channel.
      sums: of the masked gradient.

    Returns:
      The gradients, in the places of what they belong to.

    Example:
      >>> norm = Norm(jnp.array([[4.0], [10.0]]), jnp.array([2.0]), jnp.array([1.0]))
      >>> sums = jnp.array([[1.0], [3.0]])
      >>> norm_gradient(NormSettings(epsilon=0.0), norm, 2, sums).scale.tolist()
      [1.0]
    """
    mean, variance = mean_and_variance(norm.sums, count)
    root = lax.rsqrt(variance + settings.epsilon)
    total, with_z = sums
    centred = with_z - mean * total
    dmean = -norm.scale * root * total
    dvariance = jnp.where(variance > 0, -0.5 * norm.scale * root**3 * centred, 0)
    dsums = jnp.stack([dmean - 2 * mean * dvariance, dvariance]) / count
    return Norm(dsums.astype(norm.sums.dtype), centred * root, total)


def norm_act(
    settings: NormSettings, z: jax.Array, norm: Norm, shortcut: jax.Array | None = None
) -> jax.Array:
    """`relu(norm(z) + shortcut)`, whose gradient is one pass over memory.

    Args:
      settings: the static part.
      z: activations.
      norm: sums and parameters.
      shortcut: in the shape of z, or None.

    Returns:
      Activations in the dtype of z.

    Example:
      >>> z = jnp.array([1.0, 3.0]).reshape(1, 1, 1, 2)
      >>> norm = Norm(channel_sums(z), jnp.ones(1), jnp.zeros(1))
      >>> norm_act(NormSettings(epsilon=0.0), z, norm).ravel().tolist()
      [0.0, 1.0]
    """
    return _norm_act(settings, *vary_alike((z, norm, shortcut)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm_act(
    settings: NormSettings, z: jax.Array, norm: Norm, shortcut: jax.Array | None
) -> jax.Array:
    return apply(settings, affine(settings, norm, count(z, settings.channel_axis)), z, shortcut)


def _norm_act_fwd(
    settings: NormSettings, z: jax.Array, norm: Norm, shortcut: jax.Array | None
) -> tuple[jax.Array, Any]:
    x = _norm_act(settings, z, norm, shortcut)
    return x, (z, norm, None if shortcut is None else x)


def _norm_act_bwd(settings: NormSettings, residuals: Any, dx: jax.Array) -> tuple[Any, ...]:
    z, norm, joined = residuals
    values = count(z, settings.channel_axis)
    masked = masked_gradient(settings, affine(settings, norm, values), dx, z, joined)
    return masked.dz, norm_gradient(settings, norm, values, masked.sums), masked.g


_norm_act.defvjp(_norm_act_fwd, _norm_act_bwd)


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


def per_channel(numbers: jax.Array, channel_axis: int) -> jax.Array:
    """One number for each channel, in a shape that broadcasts with activations.

    Args:
      numbers: `[c]`.
      channel_axis: of the channels.

    Returns:
      `[c, 1, 1, 1]` or `[c]`.

    Example:
      >>> per_channel(jnp.ones(3), 0).shape
      (3, 1, 1, 1)
    """
    shape = [1, 1, 1, 1]
    shape[channel_axis] = -1
    return numbers.reshape(shape)


def _normalised(settings: NormSettings, affine: Affine, z: jax.Array) -> jax.Array:
    scale, shift = (per_channel(numbers, settings.channel_axis) for numbers in affine)
    return scale * z.astype(_wide(z)) + shift


def _other_axes(z: jax.Array, channel_axis: int) -> tuple[int, ...]:
    return tuple(axis for axis in range(z.ndim) if axis != channel_axis % z.ndim)


def _wide(z: jax.Array) -> Any:
    """The dtype in which it is computed."""
    return jnp.promote_types(z.dtype, jnp.float32)
