"""The epilogue `relu(scale * y + bias + residual)` of a convolution, as XLA's operations."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Epilogue(NamedTuple):
    """The arrays of an epilogue; each may be None.

    Attributes:
      scale, bias: float32 `[cout]`.
      residual: in the shape of the output.
    """

    scale: jax.Array | None = None
    bias: jax.Array | None = None
    residual: jax.Array | None = None


def apply_epilogue(
    y: Float[Array, "a b c d"],
    scale: Float[Array, " cout"] | None = None,
    bias: Float[Array, " cout"] | None = None,
    residual: Float[Array, "a b c d"] | None = None,
    relu: bool = False,
    *,
    channel_axis: int = 0,
) -> Float[Array, "a b c d"]:
    """Applies an epilogue to a convolution's output.

    Args:
      y: the output.
      scale, bias: one number for each channel.
      residual: in the shape of y.
      relu: whether negative numbers become 0.
      channel_axis: the axis of the channels in y.

    Returns:
      `relu(scale * y + bias + residual)` in the dtype of `y`, computed at least in float32.

    Example:
      >>> scale, bias = jnp.array([1.0, -1.0]), jnp.array([0.5, 1.0])
      >>> apply_epilogue(jnp.full((2, 1, 1, 1), 3.0), scale, bias, relu=True).ravel().tolist()
      [3.5, 0.0]
    """
    is_empty = scale is None and bias is None and residual is None
    wide = jnp.float64 if y.dtype == jnp.float64 else jnp.float32
    out = y if is_empty else y.astype(wide)
    per_channel = [1, 1, 1, 1]
    per_channel[channel_axis] = -1
    if scale is not None:
        out *= scale.reshape(per_channel).astype(wide)
    if bias is not None:
        out += bias.reshape(per_channel).astype(wide)
    if residual is not None:
        out += residual.astype(wide)
    return (jax.nn.relu(out) if relu else out).astype(y.dtype)


def check_epilogue(
    shape: Sequence[int], cout: int, scale: Array | None, bias: Array | None, residual: Array | None
) -> None:
    """Checks an epilogue's shapes.

    Args:
      shape: of the output.
      cout: channels of the output.
      scale, bias, residual: as in `apply_epilogue`.

    Raises:
      ValueError: one of them does not fit; the message names it.

    Example:
      >>> check_epilogue((8, 4, 4, 2), 8, jnp.ones(8), None, None)
    """
    for name, value in (("scale", scale), ("bias", bias)):
        if value is not None and value.shape != (cout,):
            raise ValueError(
                f"{name}: expected one number for each of {cout} output channels, got shape "
                f"{value.shape}"
            )
    if residual is not None and tuple(residual.shape) != tuple(shape):
        raise ValueError(
            f"residual: expected the shape of the output, {tuple(shape)}, got "
            f"{tuple(residual.shape)}"
        )
