"""`BatchNormAct` for Flax linen: `nn.BatchNorm`, a residual and a ReLU as one operation."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import canonicalize_dtype
from jaxtyping import Array, Float

from blocksparse_jax._dtypes import common_dtype
from blocksparse_jax.norm_act import finish_norm, norm_act
from blocksparse_jax.pending import (
    PendingActivations,
    RawOutput,
    activations,
    array_of,
    normalise,
)


class BatchNormAct(nn.BatchNorm):
    """`nn.BatchNorm`, then a factor, a residual and a ReLU: in training one operation.

    It has `nn.BatchNorm`'s attributes, defaults, params and statistics, under the same names: their
    checkpoints are exchangeable. `y = activation(factor * batch_norm(x) + residual)`, where
    `factor`, `residual`, `activation` and `fork` are arguments of the call. In training `norm_act`
    computes it, on CPUs in native kernels where the channels lie on axis 0 (`axis=0`).

    Behind a `BlockSparseConv` called `with_sums`, x is a `RawOutput`. In training the result is
    then `PendingActivations`: the next convolution normalises them as it reads them, and
    `activations(x)` computes them for whoever else does.

    Attributes:
      implementation: as in `blocksparse_jax.norm_act`.

    Example:
      >>> layer, x = BatchNormAct(use_running_average=False, axis=0), jnp.array([[1.0, 3.0]])
      >>> y, variables = layer.init_with_output(jax.random.key(0), x)
      >>> y.round(2).tolist(), variables["batch_stats"]["var"].tolist()
      ([[0.0, 1.0]], [1.0])

    Reference: Ioffe & Szegedy, "Batch normalization", ICML 2015.
    """

    implementation: str | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "..."] | RawOutput,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        residual: Float[Array, "..."] | PendingActivations | None = None,
        factor: Float[Array, ""] | float | None = None,
        activation: Literal["relu"] | None = "relu",
        fork: bool = False,
    ) -> Any:
        """Normalises.

        Args:
          x: activations, or a `RawOutput`.
          use_running_average: whether the statistics are the running ones and not the batch's.
          mask: as in `nn.BatchNorm`; the call then runs in its operations.
          residual: added before the activation; in the shape of x.
          factor: a scalar on the normalised branch.
          activation: "relu" or None.
          fork: whether the result is returned twice, as in `blocksparse_jax.norm_act`.

        Returns:
          Activations in the shape of x, or `PendingActivations`; a pair of them with `fork`.
        """
        is_running = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        is_plain = mask is None and isinstance(self.axis, int) and self.force_float32_reductions
        raw, x = x, array_of(x, self.axis)
        residual = None if residual is None else activations(residual)
        if is_running or not is_plain:
            y = super().__call__(x, use_running_average, mask=mask)
            return finish_norm(y, factor, residual, activation, fork)
        channels = (x.shape[self.axis],)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        scale = bias = None
        if self.use_scale:
            scale = self.param("scale", self.scale_init, channels, self.param_dtype)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, channels, self.param_dtype)
        params = [array for array in (scale, bias) if array is not None]
        dtype = canonicalize_dtype(x, *params, dtype=self.dtype)
        options = {
            "residual": residual,
            "factor": factor,
            "activation": activation,
            "epsilon": self.epsilon,
            "axis_name": None if self.is_initializing() else self.axis_name,
            "axis_index_groups": self.axis_index_groups,
        }
        if isinstance(raw, RawOutput) and self.use_fast_variance:
            y, mean, var = normalise(raw, scale, bias, dtype=dtype, **options)
            y = (y, y) if fork else y
        else:
            y, mean, var = norm_act(
                x.astype(common_dtype(x.dtype, dtype)),
                scale,
                bias,
                **options,
                fork=fork,
                channel_axis=self.axis,
                use_fast_variance=self.use_fast_variance,
                implementation=self.implementation,
            )
            y = jax.tree.map(lambda y: y.astype(dtype), y)
        if not self.is_initializing():
            old = self.momentum
            running_mean.value = old * running_mean.value + (1 - old) * mean
            running_var.value = old * running_var.value + (1 - old) * var
        return y
