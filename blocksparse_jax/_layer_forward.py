"""The forward pass that both Flax layers share, and the forms of their arguments."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float

from blocksparse_jax import _checks
from blocksparse_jax.conv import conv, finish
from blocksparse_jax.geometry import Padding, Pair, explicit_geometry, with_border
from blocksparse_jax.layout import BlockLayout
from blocksparse_jax.layout_nodes import Dense
from blocksparse_jax.linear import linear
from blocksparse_jax.norm_act_conv import conv_with_sums, norm_act_conv, norm_add_act_conv, sums_of
from blocksparse_jax.packing import refuse_foreign_values
from blocksparse_jax.pending import PendingActivations, RawOutput, activations
from pallas_kernels.dense_conv import dense_conv

LayerPadding = Padding


class CallArguments(NamedTuple):
    """What a layer's caller may add to a convolution.

    Attributes:
      scale, shift: of the output, `[cout]` or None.
      residual: in the shape of the output, or None.
      activation: `"relu"` or None.
      with_sums: whether the output is a `RawOutput`.
      with_input: whether the activations that are convolved are returned too.
    """

    scale: Float[Array, " cout"] | None = None
    shift: Float[Array, " cout"] | None = None
    residual: Float[Array, "..."] | None = None
    activation: Literal["relu"] | None = None
    with_sums: bool = False
    with_input: bool = False


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
    x: Any,
    kernel: Float[Array, "a b c d"],
    bias: Float[Array, " cout"] | None,
    layout: Any,
    shape: tuple[int, int, int, int],
    arguments: CallArguments,
) -> Any:
    """The forward pass of both Flax layers.

    Args:
      layer: has the fields of `linen.BlockSparseConv`.
      name: the layer's path, for messages.
      x: activations in `layer.data_format`, which may be pending.
      kernel: dense, in `shape`, or packed values.
      bias: `[cout]` or None.
      layout: a `BlockLayout` or `Dense()`.
      shape: `(kh, kw, cin, cout)`.
      arguments: what the caller added.

    Returns:
      Activations in `layer.data_format`, or a `RawOutput`; with the activations that were convolved
      where the caller asks for them.

    Raises:
      ValueError: the layout or the kernel does not fit; the message starts with `name`. Or
        something is to follow a convolution with sums.
    """
    if isinstance(x, PendingActivations) and x.data_format != layer.data_format:
        raise ValueError(
            f"x: expected activations in data_format={layer.data_format!r} of {name}, got pending "
            f"ones in {x.data_format!r}"
        )
    if not (arguments.with_sums and isinstance(x, PendingActivations)):
        x = activations(x)
    _check_layer(layer, name, kernel, layout, shape)
    if not arguments.with_sums:
        y: Any = _finished_conv(layer, x, kernel, bias, layout, shape, arguments)
        return (y, x) if arguments.with_input else y
    for argument in ("scale", "shift", "residual", "activation"):
        if getattr(arguments, argument) is not None:
            raise ValueError(
                f"{argument}: with_sums=True leaves what follows the convolution to the batch norm "
                f"that reads its output; give {argument} to BatchNormAct, or leave with_sums out"
            )
    if bias is not None or layer.feature_group_count > 1:
        x = activations(x)
        y = _finished_conv(layer, x, kernel, bias, layout, shape, arguments)
        z, sums = sums_of(y, layer.data_format)
    else:
        z, sums, x = _conv_with_sums(layer, x, kernel, layout, arguments.with_input)
    y = RawOutput(z, sums, layer.data_format)
    return (y, x) if arguments.with_input else y


def _finished_conv(
    layer: Any,
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    layout: BlockLayout | Dense,
    shape: tuple[int, int, int, int],
    arguments: CallArguments,
) -> jax.Array:
    """`activation(scale * (x * kernel + bias) + shift + residual)`."""
    x, promoted_kernel, bias = promote_dtype(x, kernel, bias, dtype=layer.dtype)
    if isinstance(layout, Dense):
        kernel = promoted_kernel  # else conv casts, and the gradient keeps the kernel's own dtype
    batch_axes = x.shape[:-3]
    residual = arguments.residual
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
        "scale": arguments.scale,
        "bias": _shifted_bias(bias, arguments.scale, arguments.shift),
        "residual": residual,
        "activation": arguments.activation,
    }
    y = _convolve(layer, x, kernel, layout, shape, epilogue)
    return y if layer.data_format == "CHWN" else y.reshape(*batch_axes, *y.shape[1:])


def _conv_with_sums(
    layer: Any,
    x: jax.Array | PendingActivations,
    kernel: jax.Array,
    layout: BlockLayout | Dense,
    with_input: bool,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The raw output, its sums, and with `with_input` the activations that were convolved."""
    dtype = jnp.result_type(x.dtype, kernel.dtype) if layer.dtype is None else layer.dtype
    if isinstance(layout, Dense):
        kernel = kernel.astype(dtype)
    options = _options(layer)
    if not isinstance(x, PendingActivations) or not x.read_as(dtype):
        x = activations(x)
        return *conv_with_sums(x.astype(dtype), kernel, layout, **options), x
    norm = (x.z, x.sums, x.scale, x.bias)
    options |= {"relu": x.relu, "epsilon": x.epsilon}
    if x.shortcut is None and not with_input:
        return *norm_act_conv(*norm, kernel, layout, **options), None
    stream, z, sums = norm_add_act_conv(*norm, x.shortcut, kernel, layout, **options)
    return z, sums, stream.astype(x.dtype)


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


def _options(layer: Any) -> dict[str, Any]:
    """The options of a layer's convolution, as `conv` takes them."""
    return {
        "strides": pair("strides", layer.strides),
        "padding": layer.padding,
        "dilation": pair("kernel_dilation", layer.kernel_dilation),
        "data_format": layer.data_format,
        "implementation": layer.implementation,
        "kernel_gradient": layer.kernel_gradient,
        "precision": layer.precision,
    }


def _convolve(
    layer: Any,
    x: jax.Array,
    kernel: jax.Array,
    layout: BlockLayout | Dense,
    shape: tuple[int, int, int, int],
    epilogue: dict[str, Any],
) -> jax.Array:
    """Convolves activations with one batch axis."""
    options = _options(layer)
    if layer.feature_group_count == 1:
        return conv(x, kernel, layout, **epilogue, **options)
    strides, dilation = options["strides"], options["dilation"]
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
