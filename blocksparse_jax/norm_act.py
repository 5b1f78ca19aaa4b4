"""norm_act: batch norm, a residual and a ReLU as one operation of training."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from blocksparse_jax import _checks
from pallas_kernels.batch_norm.activations import IMPLEMENTATIONS
from pallas_kernels.batch_norm.activations import norm_act as _norm_act
from pallas_kernels.batch_norm.spec import NormSpec, statistics_dtype

Activations = Float[Array, "..."] | tuple[Float[Array, "..."], ...]
"""An array; or the same one twice, where it was asked for with `fork`."""


def norm_act(
    x: Float[Array, "..."],
    scale: Float[Array, " channels"] | None = None,
    bias: Float[Array, " channels"] | None = None,
    *,
    residual: Float[Array, "..."] | None = None,
    factor: Float[Array, ""] | float | None = None,
    activation: Literal["relu"] | None = "relu",
    fork: bool = False,
    epsilon: float = 1e-5,
    channel_axis: int = 0,
    use_fast_variance: bool = True,
    axis_name: Any = None,
    axis_index_groups: Any = None,
    implementation: str | None = None,
) -> tuple[Activations, Float[Array, " channels"], Float[Array, " channels"]]:
    """Batch norm with the batch's own statistics, a residual and a ReLU, in one operation.

    `y = relu(factor * ((x - mean) / sqrt(variance + epsilon) * scale + bias) + residual)`, where
    mean and variance are those of a channel over all other axes; what is None is left out. All of
    it is computed in float32 (float64 for float64 activations) and rounded once.

    On a CPU with the native kernels, float32 and bfloat16 activations whose channels lie on axis 0
    are read from memory once for the statistics and the output, and their gradients likewise. The
    variance there is exact for any mean. In all other calls XLA's operations run, with the variance
    that `use_fast_variance` says; also where JAX sees several devices, as the batch may be sharded
    over them and the statistics are those of the whole batch, like in `flax.linen.BatchNorm`.

    Reverse mode works to any order, and forward over reverse; forward mode alone (`jax.jvp` of
    `norm_act`) takes `implementation="xla"`.

    Args:
      x: activations, e.g. `[c, h, w, n]`; float32, bfloat16, float16 or float64.
      scale: one number for each channel.
      bias: likewise.
      residual: added before the activation; in the shape of x, cast to its dtype.
      factor: a scalar on the normalised branch.
      activation: "relu" or None.
      fork: whether y is returned twice, `(y, y)`, for the branch and the shortcut of a residual
        block: the native kernels then add up the gradients of both while they read them, which
        saves a pass over memory.
      epsilon: added to the variance.
      channel_axis: the axis of the channels.
      use_fast_variance: whether XLA computes the variance as `mean(x^2) - mean(x)^2`, in one pass
        and with the errors of this difference, as flax does by default.
      axis_name: of the devices over which `jax.pmap` or `jax.shard_map` shares the batch out; the
        statistics are then those of all of them.
      axis_index_groups: groups of these devices, as in `jax.lax.pmean`.
      implementation: "cpu", the native kernels; "xla"; None: the native kernels where they can run.

    Returns:
      `(y, mean, variance)`: y in the shape and dtype of x (a pair of it with `fork`), the biased
      statistics in float32 at least. Running averages are made of these.

    Raises:
      ValueError: an argument is unknown or does not fit; the message names it.
      NotImplementedError: the native kernels are asked for and cannot run, with the reason.

    Example:
      >>> x = jnp.array([[1.0, 3.0], [0.0, 8.0]])
      >>> y, mean, variance = norm_act(x, epsilon=0.0)
      >>> y.tolist(), mean.tolist(), variance.tolist()
      ([[0.0, 1.0], [0.0, 1.0]], [2.0, 4.0], [1.0, 16.0])

    Reference: Ioffe & Szegedy, "Batch normalization", ICML 2015, algorithm 1.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim < 1:
        raise ValueError(
            f"x: expected floating point activations with an axis of channels, got {x.dtype} of "
            f"shape {x.shape}"
        )
    if not -x.ndim <= channel_axis < x.ndim:
        raise ValueError(
            f"channel_axis: expected an axis of x, from {-x.ndim} to {x.ndim - 1}, got "
            f"{channel_axis}"
        )
    channels = x.shape[channel_axis]
    wide = statistics_dtype(x.dtype)
    scale = jnp.ones(channels, wide) if scale is None else _row("scale", scale, channels, wide)
    bias = jnp.zeros(channels, wide) if bias is None else _row("bias", bias, channels, wide)
    if factor is not None:
        if jnp.ndim(factor):
            raise ValueError(f"factor: expected a scalar, got shape {jnp.shape(factor)}")
        factor = jnp.asarray(factor, wide)
        scale, bias = factor * scale, factor * bias
    if residual is not None and jnp.shape(residual) != x.shape:
        raise ValueError(f"residual: expected the shape of x, {x.shape}, got {jnp.shape(residual)}")
    if activation is not None:
        _checks.choice("activation", activation, ("relu",))
    if implementation is not None:
        _checks.choice("implementation", implementation, IMPLEMENTATIONS)
    spec = NormSpec(
        adds_residual=residual is not None,
        outputs=2 if fork else 1,
        relu=activation is not None,
        epsilon=epsilon,
        channel_axis=channel_axis % x.ndim,
        fast_variance=use_fast_variance,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
    )
    ys, mean, variance = _norm_act(
        x, scale, bias, residual, spec=spec, implementation=implementation
    )
    return ys if fork else ys[0], mean, variance


def _row(name: str, array: Any, channels: int, dtype: Any) -> Array:
    if jnp.shape(array) != (channels,):
        raise ValueError(
            f"{name}: expected one number for each of the {channels} channels of x, got shape "
            f"{jnp.shape(array)}"
        )
    return jnp.asarray(array, dtype)


def finish_norm(
    y: Float[Array, "..."],
    factor: Float[Array, ""] | float | None,
    residual: Float[Array, "..."] | None,
    activation: str | None,
    fork: bool,
) -> Activations:
    """`activation(factor * y + residual)`, as in `norm_act`, of what is normalised already."""
    if activation is not None:
        _checks.choice("activation", activation, ("relu",))
    if factor is not None:
        y = y * jnp.asarray(factor, y.dtype)
    if residual is not None:
        y = y + residual.astype(y.dtype)
    y = y if activation is None else jax.nn.relu(y)
    return (y, y) if fork else y
