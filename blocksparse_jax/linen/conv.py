"""`BlockSparseConv` for Flax linen: `nn.Conv` whose kernel may be block-sparse."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

import blocksparse_jax.serialization  # noqa: F401  registers the layouts with Flax
from blocksparse_jax._layer_forward import (
    CallArguments,
    LayerPadding,
    channel_axis,
    convolve,
    pair,
)
from blocksparse_jax.layout import BlockLayout
from blocksparse_jax.layout_nodes import Dense, is_layout
from blocksparse_jax.pending import PendingActivations
from blocksparse_jax.tree import path_name


class BlockSparseConv(nn.Module):
    """A 2-D convolution that does only the kept work where its kernel has a layout.

    It has `nn.Conv`'s parameters and defaults. `y = activation(scale * (x * kernel + bias) + shift
    + residual)`, where `scale`, `shift`, `residual` and `activation` are arguments of the call: at
    inference a batch norm, a shortcut and a ReLU in the same pass over memory.

    The layouts are a collection of their own, `layouts`, with the params' structure:
    `model.apply({"params": params, "layouts": layouts, ...}, x)`. A leaf is a `BlockLayout`,
    `Dense()` or absent (= dense). Where it is a `BlockLayout`, the param `kernel` may be the dense
    array `[kh, kw, cin, cout]` or the packed values `[groups, kept, kept_taps, group_size]`.

    Attributes:
      features: filters (output channels).
      kernel_size: `(kh, kw)`, or one integer for both.
      strides: step in pixels `(y, x)`, or one integer for both.
      padding: `"SAME"`, `"VALID"`, an integer, or per axis an integer or `(low, high)`, in pixels.
      kernel_dilation: distance between taps in pixels `(y, x)`, or one integer for both.
      feature_group_count: groups of a grouped (depthwise) convolution; above 1 the kernel must be
        dense.
      use_bias: adds a bias `[features]`.
      dtype: of the computation; None takes it from the input and the params.
      param_dtype: of the params.
      precision: as in `jax.lax.conv_general_dilated`.
      kernel_init: initializer of the kernel `[kh, kw, cin, cout]`.
      bias_init: initializer of the bias.
      data_format: `"NHWC"` or `"CHWN"` (native: no transposes around a sparse layer), of the input
        and the output.
      implementation: as in `blocksparse_jax.conv`; dense leaves do not use it, but for stems.
      kernel_gradient: `"masked"` or `"dense"`, as in `blocksparse_jax.conv`; dynamic HRBP and RigL
        need `"dense"` at their update steps.

    Raises:
      ValueError: the layout or the kernel is another layer's (the message starts with this module's
        path), the collection `layouts` names a kernel that the params do not have, or an argument
        is unknown.

    Example:
      >>> import blocksparse_jax as bsj
      >>> layer, x = BlockSparseConv(8, (3, 3)), jnp.ones((1, 5, 5, 4))
      >>> params = layer.init(jax.random.key(0), x)["params"]
      >>> counts = {"group_size": 4, "kept": 2, "kept_taps": 2}
      >>> layout = bsj.random_groups(jax.random.key(1), (3, 3, 4, 8), **counts)
      >>> values = params | {"kernel": bsj.pack(params["kernel"], layout)}
      >>> layer.apply({"params": values, "layouts": {"kernel": layout}}, x).shape
      (1, 5, 5, 8)

    Reference: the block of Ma et al., "HRBP", CPAL 2024.
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] | None = 1
    padding: LayerPadding = "SAME"
    kernel_dilation: int | Sequence[int] | None = 1
    feature_group_count: int = 1
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Callable[..., jax.Array] = nn.initializers.lecun_normal()
    bias_init: Callable[..., jax.Array] = nn.initializers.zeros_init()
    data_format: str = "NHWC"
    implementation: str | None = None
    kernel_gradient: str = "masked"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "..."] | PendingActivations,
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
          x: activations `[n, h, w, cin]` (also without or with more batch axes, as `nn.Conv`), or
            `[cin, h, w, n]` with `"CHWN"`; in training they may be `PendingActivations`.
          scale, shift: one number for each feature; a batch norm at inference has `scale = gamma /
            sqrt(var + epsilon)` and `shift = beta - mean * scale`.
          residual: added to the output; in its shape.
          activation: `"relu"` or None.
          with_sums: whether the output is a `RawOutput`, for the `BatchNormAct` behind it in
            training.
          with_input: whether the activations that are convolved are returned too, for a shortcut
            that reads them.

        Returns:
          Activations in the same format with `features` channels, or a `RawOutput` of them; a
          pair of it and the input with `with_input`.
        """
        shape = kernel_shape(self, x)
        kernel, layout = self.kernel_and_layout(x)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        name = "/".join(self.path) or type(self).__name__
        arguments = CallArguments(scale, shift, residual, activation, with_sums, with_input)
        return convolve(self, name, x, kernel, bias, layout, shape, arguments)

    def kernel_and_layout(
        self, x: Float[Array, "..."] | PendingActivations
    ) -> tuple[jax.Array, BlockLayout | Dense]:
        """The kernel, dense or packed, and its layout; for layers that convolve in another way.

        Call it inside a `@nn.compact` method.

        Args:
          x: the input, for the kernel's shape.

        Returns:
          The param `kernel`, and `Dense()` where the collection `layouts` has none for it.
        """
        if self.has_variable("params", "kernel"):
            # self.param would refuse packed values, which have another shape.
            kernel = nn.meta.unbox(self.get_variable("params", "kernel"))
        else:
            shape = kernel_shape(self, x)
            kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        return kernel, layout_of(self)


def layout_of(layer: nn.Module) -> Any:
    """The layout of a layer's kernel in the collection `layouts`, and `Dense()` without one.

    It comes in a box where the kernel does, as of `nn.with_partitioning`.
    """
    layout: Any = layer.get_variable("layouts", "kernel", None)
    if layout is None:
        check_layouts_name_params(layer)
        return Dense()
    return nn.meta.unbox(layout)


def kernel_shape(
    layer: BlockSparseConv, x: Float[Array, "..."] | PendingActivations
) -> tuple[int, int, int, int]:
    """The shape of a layer's dense kernel for an input: `(kh, kw, cin, cout)`."""
    cin = x.shape[channel_axis(layer.data_format)] // layer.feature_group_count
    return (*pair("kernel_size", layer.kernel_size), cin, layer.features)


def check_layouts_name_params(layer: nn.Module) -> None:
    """ValueError where the collection `layouts` names a kernel that is no parameter.

    Such a layout would be ignored, and its layer run dense.
    """
    if layer.is_initializing() or layer.scope is None:
        return
    variables = layer.scope.root.variables()
    layouts = jax.tree.leaves_with_path(variables.get("layouts", {}), is_leaf=is_layout)
    if not layouts:
        return
    params = jax.tree.leaves_with_path(variables.get("params", {}))
    names = {path_name(path) for path, _ in params}
    for path, node in layouts:
        name = path_name(path)
        if isinstance(node, BlockLayout) and name not in names:
            raise ValueError(
                f"layouts: {name!r} is no parameter of this model, expected names among "
                f"{sorted(names)[:8]}; give the collection the structure of the params"
            )
