"""`BatchNormAct` for Flax nnx: `nnx.BatchNorm`, a residual and a ReLU as one operation."""

from typing import Any, Literal

import jax
from flax import nnx
from flax.nnx.nn.dtypes import canonicalize_dtype
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


class BatchNormAct(nnx.BatchNorm):
    """`nnx.BatchNorm`, then a factor, a residual and a ReLU: in training one operation.

    It has `nnx.BatchNorm`'s arguments, defaults, params and statistics, under the same names. `y =
    activation(factor * batch_norm(x) + residual)`, where `factor`, `residual`, `activation` and
    `fork` are arguments of the call. In training `norm_act` computes it, on CPUs in native kernels
    where the channels lie on axis 0 (`axis=0`).

    Behind a `BlockSparseConv` called `with_sums`, x is a `RawOutput`. In training the result is
    then `PendingActivations`: the next convolution normalises them as it reads them, and
    `activations(x)` computes them for whoever else does.

    Args:
      num_features: the number of channels.
      implementation: as in `blocksparse_jax.norm_act`.
      **options: the other arguments of `nnx.BatchNorm`.

    Example:
      >>> layer = BatchNormAct(1, axis=0, rngs=nnx.Rngs(0))
      >>> layer(jax.numpy.array([[1.0, 3.0]])).round(2).tolist()
      [[0.0, 1.0]]

    Reference: Ioffe & Szegedy, "Batch normalization", ICML 2015.
    """

    def __init__(self, num_features: int, *, implementation: str | None = None, **options: Any):
        super().__init__(num_features, **options)
        self.implementation = implementation

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
          mask: as in `nnx.BatchNorm`; the call then runs in its operations.
          residual: added before the activation; in the shape of x.
          factor: a scalar on the normalised branch.
          activation: "relu" or None.
          fork: whether the result is returned twice, as in `blocksparse_jax.norm_act`.

        Returns:
          Activations in the shape of x, or `PendingActivations`; a pair of them with `fork`.
        """
        is_running = nnx.module.first_from(
            use_running_average,
            self.use_running_average,
            error_msg="use_running_average: give it to BatchNormAct or to the call",
        )
        is_own_promotion = self.promote_dtype is not nnx.nn.dtypes.promote_dtype
        raw, x = x, array_of(x, self.axis)
        residual = None if residual is None else activations(residual)
        if is_running or mask is not None or not isinstance(self.axis, int) or is_own_promotion:
            y = super().__call__(x, is_running, mask=mask)
            return finish_norm(y, factor, residual, activation, fork)
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        params = [array for array in (scale, bias) if array is not None]
        dtype = canonicalize_dtype(x, self.mean[...], self.var[...], *params, dtype=self.dtype)
        options = {
            "residual": residual,
            "factor": factor,
            "activation": activation,
            "epsilon": self.epsilon,
            "axis_name": self.axis_name,
            "axis_index_groups": self.axis_index_groups,
        }
        is_exact = common_dtype(x.dtype, dtype) == dtype
        if isinstance(raw, RawOutput) and self.use_fast_variance and is_exact:
            y, mean, var = normalise(raw, scale, bias, dtype=dtype, **options)
            y = (y, y) if fork else y
        else:
            y, mean, var = norm_act(
                x.astype(dtype),
                scale,
                bias,
                **options,
                fork=fork,
                channel_axis=self.axis,
                use_fast_variance=self.use_fast_variance,
                implementation=self.implementation,
            )
        mean, var = jax.lax.stop_gradient((mean, var))
        old = self.momentum
        self.mean[...] = old * self.mean[...] + (1 - old) * mean
        self.var[...] = old * self.var[...] + (1 - old) * var
        return y
