"""`BlockSparseConv` for Flax nnx: `nnx.Conv` whose kernel may be block-sparse."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from blocksparse_jax._layer_forward import (
    CallArguments,
    LayerPadding,
    channel_axis,
    convolve,
    pair,
)
from blocksparse_jax.layout import BlockLayout
from blocksparse_jax.layout_nodes import Dense
from blocksparse_jax.nnx.layouts import Layouts
from blocksparse_jax.pending import PendingActivations

# The initializers of nnx.Conv.
_KERNEL_INIT = nnx.initializers.lecun_normal()
_BIAS_INIT = nnx.initializers.zeros_init()


class BlockSparseConv(nnx.Conv):
    """A 2-D convolution that does only the kept work where it has a layout.

    It has `nnx.Conv`'s parameters and defaults. `y = activation(scale * (x * kernel + bias) + shift
    + residual)`, where `scale`, `shift`, `residual` and `activation` are arguments of the call.

    The layout is in `self.layout`, a `Layouts` variable that starts as `Dense()`; `set_layouts`
    sets those of a whole model. Where it is a `BlockLayout`, `self.kernel` may hold the dense
    kernel or the packed values.

    Args:
      in_features: input channels.
      out_features: filters (output channels).
      kernel_size: `(kh, kw)`, or one integer for both.
      strides: step in pixels `(y, x)`, or one integer for both.
      padding: `"SAME"`, `"VALID"`, an integer, or per axis an integer or `(low, high)`, in pixels.
      kernel_dilation: distance between taps in pixels `(y, x)`, or one integer for both.
      feature_group_count: groups of a grouped (depthwise) convolution; above 1 the kernel must be
        dense.
      use_bias: adds a bias `[out_features]`.
      dtype: of the computation; None takes it from the input and the params.
      param_dtype: of the params.
      precision: as in `jax.lax.conv_general_dilated`.
      kernel_init: initializer of the kernel `[kh, kw, cin, cout]`.
      bias_init: initializer of the bias.
      data_format: `"NHWC"` or `"CHWN"` (native: no transposes around a sparse layer), of the input
        and the output.
      implementation: as in `blocksparse_jax.conv`; a dense layer does not use it.
      kernel_gradient: `"masked"` or `"dense"`, as in `blocksparse_jax.conv`; dynamic HRBP and RigL
        need `"dense"` at their update steps.
      rngs: `nnx.Rngs`.

    Raises:
      ValueError: an argument is unknown, or (in a call) the layout or the kernel is another
        layer's.

    Example:
      >>> layer = BlockSparseConv(4, 8, (3, 3), rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 5, 5, 4))).shape
      (1, 5, 5, 8)

    Reference: the block of Ma et al., "HRBP", CPAL 2024.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        padding: LayerPadding = "SAME",
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Callable[..., jax.Array] = _KERNEL_INIT,
        bias_init: Callable[..., jax.Array] = _BIAS_INIT,
        data_format: str = "NHWC",
        implementation: str | None = None,
        kernel_gradient: str = "masked",
        rngs: nnx.Rngs,
    ):
        channel_axis(data_format)  # refuses an unknown format
        super().__init__(
            in_features,
            out_features,
            pair("kernel_size", kernel_size),
            strides,
            padding=padding,  # type: ignore[arg-type]
            kernel_dilation=kernel_dilation,
            feature_group_count=feature_group_count,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
        )
        self.set_options(implementation, kernel_gradient, data_format)

    def set_options(
        self, implementation: str | None, kernel_gradient: str, data_format: str = "NHWC"
    ) -> None:
        """Sets what this layer has beside the fields of `nnx.Conv`; its layout is dense."""
        self.layout = Layouts(Dense())
        self.data_format = data_format
        self.implementation = implementation
        self.kernel_gradient = kernel_gradient

    def __call__(
        self,
        x: Float[Array, "..."] | PendingActivations,
        layout: BlockLayout | Dense | None = None,
        *,
        scale: Float[Array, " cout"] | None = None,
        shift: Float[Array, " cout"] | None = None,
        residual: Float[Array, "..."] | None = None,
        activation: Literal["relu"] | None = None,
        with_sums: bool = False,
        with_input: bool = False,
    ) -> Any:
        """Convolves.

        Args:
          x: activations `[n, h, w, cin]` (also without or with more batch axes, as `nnx.Conv`), or
            `[cin, h, w, n]` with `"CHWN"`; in training they may be `PendingActivations`.
          layout: used in place of `self.layout`.
          scale, shift: one number for each feature; a batch norm at inference has `scale = gamma /
            sqrt(var + epsilon)` and `shift = beta - mean * scale`.
          residual: added to the output; in its shape.
          activation: `"relu"` or None.
          with_sums: whether the output is a `RawOutput`, for the `BatchNormAct` behind it in
            training.
          with_input: whether the activations that are convolved are returned too, for a shortcut
            that reads them.

        Returns:
          Activations in the same format with `out_features` channels, or a `RawOutput` of them; a
          pair of it and the input with `with_input`.
        """
        if layout is None:
            layout = self.layout.get_value()
        bias = None if self.bias is None else self.bias[...]
        return convolve(
            self,
            type(self).__name__,
            x,
            self.kernel[...],
            bias,
            layout,
            cast(tuple[int, int, int, int], self.kernel_shape),
            CallArguments(scale, shift, residual, activation, with_sums, with_input),
        )
