"""What is static about a batch norm with a residual and a ReLU."""

import dataclasses
from typing import Any

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class NormSpec:
    """The static arguments of a batch norm with what follows it.

    Attributes:
      relu: whether a ReLU ends the operation.
      epsilon: added to the variance.
      channel_axis: the axis of the channels, from 0.
      adds_residual: whether `norm_act` adds a residual.
      outputs: how many times it returns y, 1 or 2.
      fast_variance: whether XLA computes the variance as `mean(x^2) - mean(x)^2`.
      axis_name: of devices whose batches are one, as in `jax.lax.pmean`.
      axis_index_groups: of these devices, as in `jax.lax.pmean`.
    """

    relu: bool = True
    epsilon: float = 1e-5
    channel_axis: int = 0
    adds_residual: bool = False
    outputs: int = 1
    fast_variance: bool = True
    axis_name: Any = None
    axis_index_groups: Any = None


def statistics_dtype(dtype: Any) -> Any:
    """The dtype of the statistics of activations: float32, or float64 for float64.

    Args:
      dtype: of the activations.

    Returns:
      A dtype.

    Example:
      >>> statistics_dtype("bfloat16")
      dtype('float32')
    """
    return jnp.dtype("float64" if jnp.dtype(dtype) == jnp.float64 else "float32")
