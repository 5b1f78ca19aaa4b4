"""The forward pass that both Flax layers share, and the forms of their arguments."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float

from blocksparse_jax import _checks
from blocksparse_jax.conv import conv, finish
from blocksparse_jax.geometry import Padding, Pair, explicit_geometry, with_border
from blocksparse_jax.layout import BlockLayout, Dense
from blocksparse_jax.linear import linear
from blocksparse_jax.packing import refuse_foreign_values
from pallas_kernels.dense_conv import dense_conv

LayerPadding = Padding


class CallArguments(NamedTuple):
    """What a layer's caller may add to a convolution.

    Attributes:
      scale, shift: of the output, `[cout]` or None.
      residual: in the shape of the output, or None.
      activation: `"relu"` or None.
    """

    scale: Float[Array, " cout"] | None = None
    shift: Float[Array, " cout"] | None = None
    residual: Float[Array, "..."] | None = None
    activation: Literal["relu"] | None = None


def channel_axis(data_format: str) -> int:
    """The axis of the channels in activations of a format.

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
      ValueError: the value is none of these.

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
    arguments: CallArguments,
) -> Float[Array, "..."]:
    """The forward pass of both Flax layers.

    Args:
      layer: has the fields of `linen.BlockSparseConv`.
      name: the layer's path, for messages.
      x: activations in `layer.data_format`.
      kernel: dense, in `shape`, or packed values.
      bias: `[cout]` or None.
      layout: a `BlockLayout` or `Dense()`.
      shape: `(kh, kw, cin, cout)`.
      arguments: what the caller added.

    Returns:
      Activations in `layer.data_format`.

    Raises:
      ValueError: the layout or the kernel does not fit; the message starts with `name`.
    """
    _check_layer(layer, name, kernel, layout, shape)
    x, promoted_kernel, bias = promote_dtype(x, kernel, bias, dtype=layer.dtype)
    if isinstance(layout, Dense):
        kernel = promoted_kernel  # else conv casts, and the gradient keeps the kernel's own dtype
    batch_axes = x.shape[:-3]
    scale, shift, residual, activation = arguments
    if layer.data_format == "CHWN":
        if x.ndim != 4:
            raise ValueError(
                f"x: expected [cin, h, w, n] (data_format='CHWN'), got shape {x.shape}; add a "
                f"batch axis at the end"
            )
    elif len(batch_axes) != 1:
        x = x.reshape(-1, *x.shape[-3:])
        residual = None if residual is None else residual.reshape(-1, *residual.shape[-3:])
    epilogue = {
        "scale": scale,
        "bias": _shifted_bias(bias, scale, shift),
        "residual": residual,
        "activation": activation,
    }
    y = _convolve(layer, x, kernel, layout, shape, epilogue)
    return y if layer.data_format == "CHWN" else y.reshape(*batch_axes, *y.shape[1:])


def multiply(
    layer: Any,
    name: str,
    x: Float[Array, "*rows cin"],
    kernel: Float[Array, "..."],
    bias: Float[Array, " cout"] | None,
    layout: Any,
    shape: tuple[int, int],
) -> Float[Array, "*rows cout"]:
    """The forward pass of a linear layer.

    Args:
      layer: has the fields `dtype`, `implementation`, `kernel_gradient` and `precision`.
      name: the layer's path, for messages.
      x: `[..., cin]`.
      kernel: dense, in `shape`, or packed values.
      bias: `[cout]` or None.
      layout: a `BlockLayout` or `Dense()`.
      shape: `(cin, cout)`.

    Returns:
      `[..., cout]`.

    Raises:
      ValueError: the layout or the kernel does not fit; the message starts with `name`.
    """
    _check_layer(layer, name, kernel, layout, shape)
    x, promoted_kernel, bias = promote_dtype(x, kernel, bias, dtype=layer.dtype)
    return linear(
        x,
        promoted_kernel if isinstance(layout, Dense) else kernel,
        layout,
        bias=bias,
        implementation=layer.implementation,
        kernel_gradient=layer.kernel_gradient,
        precision=layer.precision,
    )


def _convolve(
    layer: Any,
    x: jax.Array,
    kernel: jax.Array,
    layout: BlockLayout | Dense,
    shape: tuple[int, int, int, int],
    epilogue: dict[str, Any],
) -> jax.Array:
    """Convolves activations with one batch axis."""
    strides = pair("strides", layer.strides)
    dilation = pair("kernel_dilation", layer.kernel_dilation)
    if layer.feature_group_count == 1:
        return conv(
            x,
            kernel,
            layout,
            strides=strides,
            padding=layer.padding,
            dilation=dilation,
            data_format=layer.data_format,
            **epilogue,
            implementation=layer.implementation,
            kernel_gradient=layer.kernel_gradient,
            precision=layer.precision,
        )
    x = with_border(x, shape[:2], layer.padding, dilation)
    geometry = explicit_geometry(x.shape[1:3], shape[:2], strides, layer.padding, dilation)
    y = dense_conv(
        x,
        kernel,
        **geometry._asdict(),
        data_format=layer.data_format,
        feature_group_count=layer.feature_group_count,
        precision=layer.precision,
    )
    return finish(y, **epilogue, data_format=layer.data_format)


def _shifted_bias(
    bias: jax.Array | None, scale: jax.Array | None, shift: jax.Array | None
) -> jax.Array | None:
    """`scale * bias + shift`: the bias of `scale * (x * kernel + bias) + shift`."""
    if bias is not None and scale is not None:
        bias = scale * bias
    if bias is None or shift is None:
        return shift if bias is None else bias
    return shift + bias


def _check_layer(
    layer: Any, name: str, kernel: jax.Array, layout: Any, shape: tuple[int, ...]
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
    elif getattr(layer, "feature_group_count", 1) > 1:
        raise ValueError(
            f"{name}/kernel: a convolution with feature_group_count={layer.feature_group_count} "
            f"stays dense; leave its kernel out of the method's `where`, or give it Dense()"
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
    else:
        refuse_foreign_values(f"{name}/kernel", kernel, layout)
