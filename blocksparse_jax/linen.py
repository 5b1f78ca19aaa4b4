"""`BlockSparseConv` for Flax linen: `nn.Conv` whose kernel may be block-sparse, and the convolution
that both Flax layers share.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import serialization
from flax.linen.dtypes import promote_dtype
from jax import lax
from jaxtyping import Array, Float

from blocksparse_jax import _checks
from blocksparse_jax import conv as ops
from blocksparse_jax.layout import BlockLayout, ConsecutiveGroups, Dense, is_layout
from blocksparse_jax.state import Spec
from blocksparse_jax.tree import path_name

Pair = tuple[int, int]
Padding = str | int | Sequence[int | Pair]


class BlockSparseConv(nn.Module):
    """A 2-D convolution with `nn.Conv`'s parameters and defaults, which does only the kept work
    where its kernel has a layout.

    `y = activation(scale * (x * kernel + bias) + shift + residual)`, what follows `bias` given in
    the call: at inference a batch norm, a shortcut and a ReLU in the same pass over memory. The
    layouts ride in a collection of their own, `layouts`, with the params' structure:
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
      implementation: as in `blocksparse_jax.conv`; dense leaves do not use it.
      kernel_gradient: `"masked"` or `"dense"`, as in `blocksparse_jax.conv`; dynamic HRBP and RigL
        need `"dense"` at their update steps.

    Raises:
      ValueError: the layout or the kernel is another layer's (the message starts with this module's
        path), the collection `layouts` names a kernel that the params do not have, or an argument
        is unknown.

    Example:
      >>> from blocksparse_jax import layout, packing
      >>> layer, x = BlockSparseConv(8, (3, 3)), jnp.ones((1, 5, 5, 4))
      >>> params = layer.init(jax.random.key(0), x)["params"]
      >>> kept = layout.BlockLayout(jnp.arange(8).reshape(2, 4), jnp.array([[0, 1], [1, 3]]), jnp.array([[0, 4], [1, 2]]), (3, 3, 4, 8))
      >>> values = params | {"kernel": packing.pack(params["kernel"], kept)}
      >>> layer.apply({"params": values, "layouts": {"kernel": kept}}, x).shape
      (1, 5, 5, 8)

    Reference: the block of Ma et al., "HRBP", CPAL 2024.
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] | None = 1
    padding: Padding = "SAME"
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
        x: Float[Array, "..."],
        *,
        scale: Float[Array, " cout"] | None = None,
        shift: Float[Array, " cout"] | None = None,
        residual: Float[Array, "..."] | None = None,
        activation: Literal["relu"] | None = None,
    ) -> Float[Array, "..."]:
        """Convolves.

        Args:
          x: activations `[n, h, w, cin]` (also without or with more batch axes, as `nn.Conv`), or
            `[cin, h, w, n]` with `"CHWN"`.
          scale, shift: one number for each feature; a batch norm at inference has `scale = gamma /
            sqrt(var + epsilon)` and `shift = beta - mean * scale`.
          residual: added to the output; in its shape.
          activation: `"relu"` or None.

        Returns:
          Activations in the same format with `features` channels.
        """
        cin = x.shape[channel_axis(self.data_format)] // self.feature_group_count
        shape = (*pair("kernel_size", self.kernel_size), cin, self.features)
        if self.has_variable(
            "params", "kernel"
        ):  # self.param accepts no packed values: they have another shape
            kernel = nn.meta.unbox(self.get_variable("params", "kernel"))
        else:
            kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = (
            self.param("bias", self.bias_init, (self.features,), self.param_dtype)
            if self.use_bias
            else None
        )
        layout: Any = self.get_variable("layouts", "kernel", None)
        if layout is None:
            _refuse_strangers(self)
            layout = Dense()
        return convolve(
            self,
            "/".join(self.path) or type(self).__name__,
            x,
            kernel,
            bias,
            layout,
            shape,
            scale=scale,
            shift=shift,
            residual=residual,
            activation=activation,
        )


def channel_axis(data_format: str) -> int:
    """The axis of the channels in activations of that format.

    Args:
      data_format: `"NHWC"` or `"CHWN"`.

    Returns:
      -1 or 0.

    Raises:
      ValueError: the format is unknown.

    Example:
      >>> channel_axis("CHWN")
      0
    """
    return {"NHWC": -1, "CHWN": 0}[_checks.data_format(data_format)]


def pair(name: str, value: int | Sequence[int] | None) -> Pair:
    """Two integers from one or two; None is 1, as in `nn.Conv`.

    Args:
      name: the argument, for the message.
      value: an integer of at least 1, two of them, or None.

    Returns:
      `(y, x)`.

    Raises:
      ValueError: something else was given.

    Example:
      >>> pair("strides", 2), pair("strides", None)
      ((2, 2), (1, 1))
    """
    return _checks.pair(name, 1 if value is None else value)


def convolve(
    layer: Any,
    name: str,
    x: Float[Array, "..."],
    kernel: Float[Array, "a b c d"],
    bias: Float[Array, " cout"] | None,
    layout: Any,
    shape: tuple[int, int, int, int],
    *,
    scale: Float[Array, " cout"] | None = None,
    shift: Float[Array, " cout"] | None = None,
    residual: Float[Array, "..."] | None = None,
    activation: Literal["relu"] | None = None,
) -> Float[Array, "..."]:
    """The forward pass of both Flax layers.

    Args:
      layer: has the fields of `linen.BlockSparseConv`.
      name: the layer's path, for messages.
      x: activations in `layer.data_format`.
      kernel: dense `shape`, or packed values.
      bias: `[cout]` or None.
      layout: a `BlockLayout` or `Dense()`.
      shape: `(kh, kw, cin, cout)`.
      scale, shift: of the output, `[cout]` or None.
      residual: as the output, or None.
      activation: `"relu"` or None.

    Returns:
      Activations in `layer.data_format`.

    Raises:
      ValueError: the layout or the kernel does not fit; the message starts with `name`.
    """
    _check_layer(layer, name, kernel, layout, shape)
    x, promoted, bias = promote_dtype(x, kernel, bias, dtype=layer.dtype)
    kernel = (
        promoted if isinstance(layout, Dense) else kernel
    )  # ops.conv casts, and gives its gradient in the kernel's own dtype
    strides, dilation, padding = (
        pair("strides", layer.strides),
        pair("kernel_dilation", layer.kernel_dilation),
        _padding(layer.padding),
    )
    native, batch = layer.data_format == "CHWN", x.shape[:-3]
    if native and x.ndim != 4:
        raise ValueError(
            f"x: expected [cin, h, w, n] (data_format='CHWN'), got shape {x.shape}; add a batch "
            f"axis at the end"
        )
    if not native and len(batch) != 1:
        x = x.reshape(-1, *x.shape[-3:])
        residual = None if residual is None else residual.reshape(-1, *residual.shape[-3:])
    bias = bias if bias is None or scale is None else scale * bias
    bias = bias if shift is None else shift if bias is None else shift + bias
    kh, kw, cin, cout = shape
    few_rows = kh * kw == 1 or kh * kw * cin <= 2 * cout
    if layer.feature_group_count > 1:
        dimensions = (layer.data_format, "HWIO", layer.data_format)
        y = lax.conv_general_dilated(
            x,
            kernel,
            strides,
            padding,
            None,
            dilation,
            dimensions,
            layer.feature_group_count,
            precision=layer.precision,
        )
    elif native and isinstance(layout, Dense) and few_rows:
        y = matrix_conv(
            x,
            kernel,
            strides=strides,
            padding=padding,
            dilation=dilation,
            precision=layer.precision,
        )
    else:
        y = ops.conv(
            x,
            kernel,
            layout,
            strides=strides,
            padding=padding,
            dilation=dilation,
            data_format=layer.data_format,
            scale=scale,
            bias=bias,
            residual=residual,
            activation=activation,
            implementation=layer.implementation,
            kernel_gradient=layer.kernel_gradient,
            precision=layer.precision,
        )
        return y if native else y.reshape(*batch, *y.shape[1:])
    y = ops.finish(y, scale, bias, residual, activation, layer.data_format)
    return y if native else y.reshape(*batch, *y.shape[1:])


def matrix_conv(
    x: Float[Array, "cin h w n"],
    kernel: Float[Array, "kh kw cin cout"],
    *,
    strides: Pair = (1, 1),
    padding: str | Sequence[Pair] = "SAME",
    dilation: Pair = (1, 1),
    precision: Any = None,
) -> Float[Array, "cout ho wo n"]:
    """A dense CHWN convolution as one matrix product: `kernel^T` times the shifted rows `[kh * kw *
    cin, ho * wo * n]`.

    XLA's CPU convolution runs in NHWC, so a CHWN one transposes its activations; this one does not.
    It costs the memory of the rows, so the layers use it where they are at most twice the output (a
    stem of 3 channels) and for 1x1 kernels.

    Args:
      x: activations `[cin, h, w, n]`.
      kernel: `[kh, kw, cin, cout]`.
      strides, dilation: in pixels `(y, x)`.
      padding: `"SAME"`, `"VALID"` or `((top, bottom), (left, right))` in pixels.
      precision: as in `jax.lax.dot_general`.

    Returns:
      `[cout, ho, wo, n]`.

    Example:
      >>> matrix_conv(jnp.ones((3, 8, 8, 2)), jnp.ones((3, 3, 3, 16)), strides=(2, 2)).shape
      (16, 4, 4, 2)
    """
    kh, kw, cin, cout = kernel.shape
    reach = ((kh - 1) * dilation[0] + 1, (kw - 1) * dilation[1] + 1)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], reach, strides, padding)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    ho, wo = ((size - r) // s + 1 for size, r, s in zip(x.shape[1:3], reach, strides))
    ends = ((ho - 1) * strides[0] + 1, (wo - 1) * strides[1] + 1)
    starts = [(i * dilation[0], j * dilation[1]) for i in range(kh) for j in range(kw)]
    shifted = [x[:, i : i + ends[0] : strides[0], j : j + ends[1] : strides[1]] for i, j in starts]
    rows = jnp.concatenate(shifted).reshape(kh * kw * cin, -1)
    y = lax.dot_general(
        kernel.reshape(-1, cout), rows, (((0,), (0,)), ((), ())), precision=precision
    )
    return y.reshape(cout, ho, wo, -1)


def _padding(padding: Padding) -> str | tuple[Pair, Pair]:
    """Pairs from the forms of padding that `nn.Conv` accepts."""
    if isinstance(padding, str):
        return _checks.choice("padding", padding, ("SAME", "VALID"))
    axes = (padding, padding) if isinstance(padding, int) else padding
    try:
        (top, bottom), (left, right) = (
            (axis, axis) if isinstance(axis, int) else axis for axis in axes
        )
    except (TypeError, ValueError):
        expected = "'SAME', 'VALID', an integer, or two integers or (low, high) pairs"
        raise ValueError(f"padding: expected {expected}, got {padding!r}") from None
    return (top, bottom), (left, right)


def _refuse_strangers(layer: nn.Module) -> None:
    """ValueError where `layouts` holds a BlockLayout at a name that is no parameter: it would be
    ignored, and its layer run dense.
    """
    if layer.is_initializing() or layer.scope is None:
        return
    variables = layer.scope.root.variables()
    layouts = jax.tree.leaves_with_path(variables.get("layouts", {}), is_leaf=is_layout)
    known = (
        {path_name(path) for path, _ in jax.tree.leaves_with_path(variables.get("params", {}))}
        if layouts
        else set()
    )
    for path, node in layouts:
        if isinstance(node, BlockLayout) and path_name(path) not in known:
            raise ValueError(
                f"layouts: {path_name(path)!r} is no parameter of this model, expected names among "
                f"{sorted(known)[:8]}; give the "
                "collection the structure of the params"
            )


def _check_layer(
    layer: Any, name: str, kernel: jax.Array, layout: Any, shape: tuple[int, int, int, int]
) -> None:
    """ValueError unless the kernel and the layout are this layer's."""
    if isinstance(layout, Dense):
        if kernel.shape != shape:
            raise ValueError(
                f"{name}/kernel: expected shape {shape}, got {kernel.shape}; packed values need "
                f"their layout in the collection 'layouts'"
            )
    elif not isinstance(layout, BlockLayout):
        raise ValueError(
            f"{name}/kernel: expected a BlockLayout or Dense() as its layout, got {layout!r}; read "
            f"layouts with get_layouts(state)"
        )
    elif layer.feature_group_count > 1:
        raise ValueError(
            f"{name}/kernel: a convolution with feature_group_count={layer.feature_group_count} "
            f"stays dense; give it Dense()"
        )
    elif tuple(layout.shape) != shape:
        raise ValueError(
            f"{name}/kernel: its layout is of a kernel {tuple(layout.shape)}, expected {shape}; "
            f"layouts must be of this model"
        )
    elif kernel.shape not in (shape, layout.packed_shape):
        raise ValueError(
            f"{name}/kernel: expected shape {shape} or packed {layout.packed_shape}, got "
            f"{kernel.shape}; repack with the layout"
        )


def _register_serialization() -> None:
    """`flax.serialization` can write an optimizer state: of layouts the index arrays; what is
    static comes from the target.
    """
    arrays = ("filters", "channels", "taps")

    def restore(layout: BlockLayout, state: dict[str, Any]) -> BlockLayout:
        return dataclasses.replace(
            layout,
            **{
                name: serialization.from_state_dict(getattr(layout, name), state[name])
                for name in arrays
            },
        )

    serialization.register_serialization_state(
        BlockLayout, lambda layout: {name: getattr(layout, name) for name in arrays}, restore
    )
    for static in (Dense, ConsecutiveGroups, Spec):
        serialization.register_serialization_state(
            static, lambda node: {}, lambda node, state: node
        )


_register_serialization()
