"""Batch norm of activations, which takes the statistics from them: `norm_act`."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.batch_norm import xla
from pallas_kernels.batch_norm.derivative import Operands, normalise
from pallas_kernels.batch_norm.spec import NormSpec, statistics_dtype
from pallas_kernels.block_sparse_conv import cpu as native_kernels
from pallas_kernels.block_sparse_conv.cpu.launch import DTYPES
from pallas_kernels.reverse_mode import NORM_ACT, reverse_mode_only
from pallas_kernels.varying import vary_alike, varying_axes

IMPLEMENTATIONS = ("cpu", "xla")


def norm_act(
    x: Float[Array, "..."],
    scale: Float[Array, " channels"],
    bias: Float[Array, " channels"],
    residual: Float[Array, "..."] | None = None,
    *,
    spec: NormSpec,
    implementation: str | None = None,
) -> tuple[tuple[Array, ...], Float[Array, " channels"], Float[Array, " channels"]]:
    """Normalises every channel by the batch's own statistics, adds a residual, applies a ReLU.

    `y = relu((x - mean) * scale / sqrt(variance + epsilon) + bias + residual)`.

    The native kernels read a channel while it is in the cache, for the statistics and for the
    output, and likewise for its gradients; where y is returned twice, they also add up the
    gradients of both. Their own derivatives, to any order, are those of the XLA formulation;
    forward mode (`jax.jvp`) on the operation itself is a TypeError there.

    Args:
      x: activations.
      scale, bias: one number for each channel.
      residual: as x; its dtype is cast to that of x.
      spec: the static arguments.
      implementation: "cpu", the native kernels; "xla"; None: the native kernels where they can run.

    Returns:
      `(ys, mean, variance)`: y as x, once or twice; the statistics in float32 at least.

    Raises:
      NotImplementedError: the native kernels are asked for and cannot run; the message says why.

    Example:
      >>> x = jnp.array([[1.0, 3.0], [2.0, 2.0]])
      >>> (y,), mean, variance = norm_act(x, jnp.ones(2), jnp.zeros(2), spec=NormSpec())
      >>> mean.tolist(), variance.tolist()
      ([2.0, 2.0], [1.0, 0.0])
    """
    reason = why_not_native(x, spec)
    if implementation == "cpu" and reason:
        raise NotImplementedError(f"implementation='cpu': {reason}")
    wide = statistics_dtype(x.dtype)
    scale, bias = scale.astype(wide), bias.astype(wide)
    residual = None if residual is None else residual.astype(x.dtype)
    operands = Operands(x, scale, bias, residual)
    if reason or implementation == "xla":
        y, mean, variance = xla.forward(spec, *operands)
        return (y,) * spec.outputs, mean, variance
    return normalise(spec, vary_alike(reverse_mode_only(operands, NORM_ACT)))


def why_not_native(x: Any, spec: NormSpec) -> str | None:
    """Why the native kernels cannot run a call.

    Args:
      x: the activations.
      spec: the static arguments.

    Returns:
      None where they can, else the reason.
    """
    if reason := native_kernels.unavailable():
        return reason
    if jnp.dtype(x.dtype).name not in DTYPES:
        return f"computes in {' and '.join(DTYPES)}, not in {x.dtype}"
    if spec.channel_axis != 0:
        return f"takes the channels on axis 0, not on axis {spec.channel_axis}"
    if not all(isinstance(size, int) and size > 0 for size in x.shape):
        return f"needs sizes that are known and positive, got {x.shape}"
    if spec.axis_name is not None:
        return "its statistics are those of one device, and axis_name asks for those of several"
    if jax.device_count() > 1 and not varying_axes([x]):
        return (
            f"its statistics are those of one device, and the batch may be sharded over "
            f"{jax.device_count()}"
        )
    return None
