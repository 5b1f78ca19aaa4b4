"""What follows a convolution's sums, as XLA does it: `relu(scale * y + bias + residual)`, as far as
each is given.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


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
      residual: as y.
      relu: whether negative numbers become 0.
      channel_axis: of y.

    Returns:
      `relu(scale * y + bias + residual)` in the dtype of `y`, computed in float32.

    Example:
      >>> apply_epilogue(jnp.full((2, 1, 1, 1), 3.0), scale=jnp.array([1.0, -1.0]), bias=jnp.array([0.5, 1.0]), relu=True).ravel().tolist()
      [3.5, 0.0]
    """
    out = y if scale is None and bias is None and residual is None else y.astype(jnp.float32)
    along = [1, 1, 1, 1]
    along[channel_axis] = -1
    if scale is not None:
        out *= scale.reshape(along)
    if bias is not None:
        out += bias.reshape(along)
    if residual is not None:
        out += residual
    return (jax.nn.relu(out) if relu else out).astype(y.dtype)


def check_epilogue(
    shape: Sequence[int], cout: int, scale: Array | None, bias: Array | None, residual: Array | None
) -> None:
    """Checks an epilogue's shapes.

    Args:
      shape: of the output.
      cout: its channels.
      scale, bias, residual: as in `apply_epilogue`.

    Raises:
      ValueError: one does not fit; the message names it.

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
