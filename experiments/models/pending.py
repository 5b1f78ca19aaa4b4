"""The zoo's convolutions between batch norms: in training, outputs travel raw with their sums.

`Parts.conv_norm` returns a `Pending` where `Parts.fused` says so. The next convolution reads it as
it is (`blocksparse_jax.norm_act_conv`); pools and the classifier read its activations. Parameters
and statistics have the names and the values of the other networks.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

import blocksparse_jax as bsj
from blocksparse_jax.linen import BlockSparseConv

if TYPE_CHECKING:
    from experiments.models.layers import Parts

MOMENTUM = 0.9
EPSILON = 1e-5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pending:
    """`relu(norm(z) + shortcut)`, not computed yet.

    Attributes:
      z: the raw output of a convolution.
      sums: of z, `[2, c]`.
      scale, bias: `[c]`, of the batch norm.
      shortcut: in the shape of z, or None.
      relu: whether a ReLU ends it (static).
      data_format: of z (static).
    """

    z: jax.Array
    sums: jax.Array
    scale: jax.Array
    bias: jax.Array
    shortcut: jax.Array | None = None
    relu: bool = dataclasses.field(default=True, metadata={"static": True})
    data_format: str = dataclasses.field(default="CHWN", metadata={"static": True})

    def value(self) -> Float[Array, "a h w b"]:
        """Computes the activations."""
        return bsj.norm_act_apply(
            *(self.z, self.sums, self.scale, self.bias, self.shortcut),
            relu=self.relu,
            epsilon=EPSILON,
            data_format=self.data_format,
        )


def activations(x: Any) -> Float[Array, "a h w b"]:
    """The activations of what may be pending.

    Args:
      x: activations, or a `Pending`.

    Returns:
      The activations.

    Example:
      >>> activations(jnp.ones((4, 2, 2, 1))).shape
      (4, 2, 2, 1)
    """
    return x.value() if isinstance(x, Pending) else x


class NormActConv(BlockSparseConv):
    """`BlockSparseConv` of what may be pending; its output is raw, with its sums."""

    @nn.compact
    def __call__(  # type: ignore[override]
        self, x: Any, with_input: bool = False
    ) -> tuple[Array, Array, Array | None]:
        """Convolves.

        Args:
          x: activations, or a `Pending`.
          with_input: whether the activations are returned too.

        Returns:
          The raw output, its sums and the activations that were convolved, or None.
        """
        kernel, layout = self.kernel_and_layout(x.z if isinstance(x, Pending) else x)
        options = {
            "strides": self.strides,
            "padding": self.padding,
            "data_format": self.data_format,
            "implementation": self.implementation,
            "kernel_gradient": self.kernel_gradient,
        }
        if not isinstance(x, Pending):
            return *bsj.conv_with_sums(x, kernel, layout, **options), x
        norm = (x.z, x.sums, x.scale, x.bias)
        options |= {"relu": x.relu, "epsilon": EPSILON}
        if x.shortcut is None and not with_input:
            return *bsj.norm_act_conv(*norm, kernel, layout, **options), None
        stream, z, sums = bsj.norm_add_act_conv(*norm, x.shortcut, kernel, layout, **options)
        return z, sums, stream


class SumsNorm(nn.Module):
    """The parameters and the running statistics of a batch norm, which follow from sums."""

    @nn.compact
    def __call__(self, sums: Float[Array, "2 c"], count: int) -> tuple[Array, Array]:
        """Updates the statistics.

        Args:
          sums: of the batch.
          count: values of a channel.

        Returns:
          Scale and bias `[c]`.
        """
        shape = sums.shape[1:]
        statistics = [
            self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32),
            self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32),
        ]
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        if not self.is_initializing():
            for running, batch in zip(statistics, bsj.mean_and_variance(sums, count)):
                running.value = MOMENTUM * running.value + (1 - MOMENTUM) * batch
        return scale, bias


def conv_norm(
    parts: "Parts",
    x: Any,
    features: int,
    size: int,
    strides: int,
    *,
    name: str,
    norm_name: str,
    residual: Any = None,
    factor: Float[Array, ""] | None = None,
    relu: bool = True,
    with_input: bool = False,
) -> tuple[Pending, Array | None]:
    """`Parts.conv_norm` in training, between batch norms.

    Args:
      parts: the settings of the network.
      x: activations, or a `Pending`.
      features, size, strides, name, norm_name, residual, factor, relu: as in `Parts.conv_norm`.
      with_input: whether the activations of x are returned too.

    Returns:
      The pending result, and the activations that were convolved, or None.
    """
    conv = parts.conv(features, size, strides, name=name, kind=NormActConv)
    z, sums, stream = conv(x, with_input)
    count = z.size // z.shape[parts.channel_axis]
    scale, bias = SumsNorm(name=norm_name)(sums, count)
    if factor is not None:
        scale, bias = factor * scale, factor * bias
    shortcut = None if residual is None else activations(residual)
    return Pending(z, sums, scale, bias, shortcut, relu, parts.data_format), stream
