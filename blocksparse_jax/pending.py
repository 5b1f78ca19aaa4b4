"""What travels between the Flax layers of convolutions and batch norms in training.

    y = conv(x, with_sums=True)  # a RawOutput: what was convolved, with the sums of its channels
    x = norm(y, residual=stream)  # PendingActivations: normalised by whoever reads them
    y, stream = conv(x, with_sums=True, with_input=True)  # and what a shortcut reads

A convolution reads pending activations as they are (`norm_act_conv`), a max pool too; everything
else calls `activations(x)` first.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from blocksparse_jax import _checks
from blocksparse_jax._dtypes import common_dtype
from blocksparse_jax.norm_act_conv import mean_and_variance, norm_act_apply

__all__ = ["PendingActivations", "RawOutput", "activations"]

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RawOutput:
    """The output of a convolution whose batch norm is yet to come.

    The layer `BatchNormAct` reads it; `z` is the output that the convolution gives without sums.

    Attributes:
      z: the output, in the data format.
      sums: `[2, c]`, the sums of each channel and of its squares.
      data_format: "NHWC" or "CHWN" (static).

    Example:
      >>> import blocksparse_jax as bsj
      >>> layer, x = bsj.linen.BlockSparseConv(8, (3, 3)), jnp.ones((1, 5, 5, 4))
      >>> y, _ = layer.init_with_output(jax.random.key(0), x, with_sums=True)
      >>> isinstance(y, RawOutput), y.shape, y.sums.shape
      (True, (1, 5, 5, 8), (2, 8))
    """

    z: jax.Array
    sums: jax.Array
    data_format: str = dataclasses.field(default="NHWC", metadata=_STATIC)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the output."""
        return self.z.shape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PendingActivations:
    """`relu(norm(z) + shortcut)`, not computed yet.

    The layer `BatchNormAct` gives it for a `RawOutput`, and `BlockSparseConv` takes it.

    Attributes:
      z: the raw output of a convolution.
      sums: of z, `[2, c]`; over several devices, the mean of theirs.
      scale, bias: `[c]`, of the batch norm.
      shortcut: in the shape of z, or None.
      relu: whether a ReLU ends it (static).
      epsilon: added to the variance (static).
      data_format: of z (static).
      dtype: of the activations (static).

    Example:
      >>> z, one = jnp.array([1.0, 3.0]).reshape(2, 1, 1, 1), jnp.ones(1)
      >>> x = PendingActivations(z, jnp.array([[4.0], [10.0]]), one, 0 * one, epsilon=0.0)
      >>> activations(x).ravel().tolist()
      [0.0, 1.0]
    """

    z: jax.Array
    sums: jax.Array
    scale: jax.Array
    bias: jax.Array
    shortcut: jax.Array | None = None
    relu: bool = dataclasses.field(default=True, metadata=_STATIC)
    epsilon: float = dataclasses.field(default=1e-5, metadata=_STATIC)
    data_format: str = dataclasses.field(default="NHWC", metadata=_STATIC)
    dtype: Any = dataclasses.field(default="float32", metadata=_STATIC)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the activations."""
        return self.z.shape

    def value(self) -> Float[Array, "a h w b"]:
        """Computes the activations."""
        z = self.z.astype(common_dtype(self.z.dtype, self.dtype))
        x = norm_act_apply(
            *(z, self.sums, self.scale, self.bias, self.shortcut),
            relu=self.relu,
            epsilon=self.epsilon,
            data_format=self.data_format,
        )
        return x.astype(self.dtype)

    def read_as(self, dtype: Any) -> bool:
        """Whether a convolution in a dtype may read z and give what it gives for the activations.

        Args:
          dtype: in which it convolves.

        Returns:
          False where rounding to the dtypes in turn is another rounding than that to the dtype of
          z.
        """
        own = jnp.dtype(self.dtype)
        return self.z.dtype == jnp.dtype(dtype) and common_dtype(self.z.dtype, own) == own


def activations(x: Any) -> Float[Array, "..."]:
    """The activations of what may be pending.

    Args:
      x: activations, or `PendingActivations`.

    Returns:
      Activations.

    Raises:
      ValueError: it is a `RawOutput`, whose batch norm is missing.

    Example:
      >>> activations(jnp.ones((1, 2, 2, 4))).shape
      (1, 2, 2, 4)
    """
    if isinstance(x, RawOutput):
        raise ValueError(
            "x: expected activations, got a RawOutput; give it to BatchNormAct first, or read its "
            "output, x.z"
        )
    return x.value() if isinstance(x, PendingActivations) else x


def array_of(x: Any, axis: Any) -> Float[Array, "..."]:
    """What a batch norm over an axis reads, as an array.

    Args:
      x: activations, or a `RawOutput`.
      axis: of the channels, as the layer has it.

    Returns:
      The activations that are normalised.

    Raises:
      ValueError: the channels of the raw output lie on another axis.
    """
    if not isinstance(x, RawOutput):
        return activations(x)
    channels = x.data_format.index("C")
    if not isinstance(axis, int) or axis % 4 != channels:
        raise ValueError(
            f"axis: expected {channels}, where the channels of the convolution's output lie "
            f"(data_format={x.data_format!r}), got {axis!r}"
        )
    return x.z


def normalise(
    y: RawOutput,
    scale: Float[Array, " c"] | None,
    bias: Float[Array, " c"] | None,
    *,
    residual: Any,
    factor: Float[Array, ""] | float | None,
    activation: str | None,
    epsilon: float,
    dtype: Any,
    axis_name: Any,
    axis_index_groups: Any,
) -> tuple[PendingActivations, Array, Array]:
    """The batch norm of a raw output, as both Flax layers call it.

    Args:
      y: the raw output.
      scale, bias: `[c]`, or None.
      residual: activations in the shape of y, which may be pending, or None.
      factor: a scalar on the normalised branch, or None.
      activation: "relu" or None.
      epsilon: added to the variance.
      dtype: of the result.
      axis_name, axis_index_groups: as in `norm_act`.

    Returns:
      The activations, mean and variance.

    Raises:
      ValueError: an argument is unknown or does not fit; the message names it.
    """
    if activation is not None:
        _checks.choice("activation", activation, ("relu",))
    sums, shortcut = y.sums, None if residual is None else activations(residual)
    if shortcut is not None and shortcut.shape != y.z.shape:
        raise ValueError(f"residual: expected the shape of x, {y.z.shape}, got {shortcut.shape}")
    if axis_name is not None:
        sums = lax.pmean(sums, axis_name, axis_index_groups=axis_index_groups)
    rows = [
        jnp.full(sums.shape[1:], value, sums.dtype) if row is None else row.astype(sums.dtype)
        for value, row in ((1, scale), (0, bias))
    ]
    if factor is not None:
        rows = [jnp.asarray(factor, sums.dtype) * row for row in rows]
    x = PendingActivations(
        y.z,
        sums,
        rows[0],
        rows[1],
        shortcut,
        relu=activation is not None,
        epsilon=epsilon,
        data_format=y.data_format,
        dtype=jnp.dtype(dtype),
    )
    return x, *mean_and_variance(sums, y.z.size // sums.shape[1])
