"""conv: a convolution with the kept weights only, by the fastest backend that fits."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from blocksparse_jax import _checks
from blocksparse_jax.geometry import (
    Geometry,
    Padding,
    explicit_geometry,
    images_of_rows,
    with_border,
)
from blocksparse_jax.kernel_gradient import dense_kernel_gradient
from blocksparse_jax.layout import BlockLayout, layout_to_mask
from blocksparse_jax.layout_nodes import Dense
from blocksparse_jax.masks import straight_through
from blocksparse_jax.packing import pack, refuse_foreign_values, unpack
from pallas_kernels.block_sparse_conv import (
    Choice,
    ConvSpec,
    Plan,
    apply_epilogue,
    available_implementations,
    block_sparse_conv,
    check_epilogue,
    whole_kernel_conv,
    whole_kernel_implementation,
    why_dense,
)
from pallas_kernels.block_sparse_conv import choose_implementation as _choose
from pallas_kernels.dense_conv import dense_conv
from pallas_kernels.reverse_mode import OVER_REVERSE, reverse_mode_only
from pallas_kernels.sharding import CONVOLUTION, whole_but_images

__all__ = [
    "available_implementations",
    "choose_implementation",
    "conv",
    "dense_kernel_gradient",
    "finish",
]

DataFormat = Literal["NHWC", "CHWN"]
_DTYPES = ("float32", "bfloat16", "float16")
_TRANSPOSED = (3, 1, 2, 0)
"""The axes that turn NHWC into CHWN, and back."""


def conv(
    x: Float[Array, "a h w b"],
    kernel: Float[Array, "p q r s"],
    layout: BlockLayout | Dense,
    *,
    strides: int | Sequence[int] = (1, 1),
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = (1, 1),
    data_format: DataFormat = "NHWC",
    scale: Float[Array, " cout"] | None = None,
    bias: Float[Array, " cout"] | None = None,
    residual: Float[Array, "c ho wo d"] | None = None,
    activation: Literal["relu"] | None = None,
    implementation: str | None = None,
    kernel_gradient: Literal["masked", "dense"] = "masked",
    packed: bool | None = None,
    precision: Any = None,
    plan: Plan | None = None,
) -> Float[Array, "c ho wo d"]:
    """Convolves with the kept weights of a conv kernel; all three passes do only the kept work.

    Equals `y = lax.conv_general_dilated(x, where(mask, kernel, 0))` with `mask =
    layout_to_mask(layout)`, followed by `activation(scale * y + bias + residual)`; an argument that
    is None is left out of the formula. At inference these are a batch norm, a shortcut and a ReLU,
    which the native kernels apply while they store y. The kernels compute in CHWN; NHWC inputs are
    transposed before them, and the output back.

    A batch of no images gives an output of none, and gradients of zero.

    Values that are not finite reach every output that they are multiplied into. Pruned weights take
    no part: their infinities do not show, where a masked dense convolution would multiply them by
    0. Where a kept weight that is not finite meets the zeros around the image, the native kernels
    give NaN, as a dense convolution does; XLA's formulations may leave those products out.

    Reverse mode works to any order (`jax.grad` of `jax.grad`), and forward over reverse (`jax.jvp`
    of `jax.grad`, Hessian-vector products; with `kernel_gradient="dense"` only in the
    implementation "dense"); from the second order on XLA's operations do the work. Forward mode
    alone (`jax.jvp` of `conv`) takes `implementation="dense"`.

    On a CPU a kernel without a layout (`Dense()`) runs in the native kernels too, in CHWN, where
    they are faster in all passes than XLA's dense convolution. On a GPU a stem (fewer than 8 input
    channels) in 16 bits does so in the Triton kernels, where `implementation` is None or Triton's.

    Args:
      x: activations `[n, h, w, cin]`, or `[cin, h, w, n]` with `data_format="CHWN"`; float32,
        bfloat16 or float16.
      kernel: the conv kernel `[kh, kw, cin, cout]`, or its packed values `[groups, kept, kept_taps,
        group_size]`; cast to `x.dtype`, products are accumulated in float32.
      layout: the kernel's layout; `Dense()` convolves with the whole kernel.
      strides: step in pixels `(y, x)`, or one integer for both.
      padding: as in `nn.Conv`: "SAME", "VALID", "SAME_LOWER", "CIRCULAR" (the image continued
        periodically), "REFLECT" (mirrored), or pixels: an integer, or for each axis an integer or a
        pair `(low, high)`.
      dilation: distance between taps in pixels `(y, x)`, or one integer for both.
      data_format: "NHWC" or "CHWN", of input and output.
      scale: one number for each output channel.
      bias: likewise.
      residual: added to the output; in its shape.
      activation: "relu" or None.
      implementation: None picks by device, layout and measured tables (`choose_implementation` says
        what, and why); or one of `available_implementations()`, which says of each whether it can
        run here and why not ("dense": masked weights, dense convolution).
      kernel_gradient: "masked": zero outside the mask; "dense": the full gradient, which RigL and
        dynamic HRBP need at their update steps to grow weights (dense kernels only).
      packed: whether `kernel` holds packed values; None decides by its shape.
      precision: as in `lax.conv_general_dilated`.
      plan: the lists that GPU kernels read, `with_plans(layout).plan`; None takes `layout.plan`,
        and without one a step makes them. Its contents are not checked.

    Returns:
      `[n, ho, wo, cout]` or `[cout, ho, wo, n]`, in `x.dtype`.

    Raises:
      ValueError: an argument is unknown or does not fit; the message names it.
      NotImplementedError: the named implementation cannot run this call, with the reason.

    Example:
      >>> import blocksparse_jax as bsj
      >>> mask = jnp.zeros((3, 3, 4, 8), bool)
      >>> mask = mask.at[:, :, :2, :4].set(True).at[:, :, 2:, 4:].set(True)
      >>> layout, kernel = bsj.mask_to_layout(mask), jnp.ones((3, 3, 4, 8))
      >>> conv(jnp.ones((1, 5, 5, 4)), kernel, layout)[0, 2, 2].tolist()
      [18.0, 18.0, 18.0, 18.0, 18.0, 18.0, 18.0, 18.0]

    Reference: HRBP's accelerated training, Ma et al., CPAL 2024.
    """
    data_format = _checks.data_format(data_format)
    _checks.choice("kernel_gradient", kernel_gradient, ("masked", "dense"))
    if implementation is not None:
        _checks.implementation(implementation, available_implementations())
    elif why_dense():
        implementation = "dense"
    _check_layout(layout)
    if isinstance(layout, BlockLayout) and len(layout.shape) != 4:
        raise ValueError(
            f"layout: expected that of a conv kernel, got one of a dense kernel {layout.shape}; "
            "call linear"
        )
    if plan is not None and isinstance(layout, Dense):
        raise ValueError("plan: a Dense() layout has no lists; leave the plan out")
    if jnp.ndim(x) != 4 or jnp.ndim(kernel) != 4:
        raise ValueError(
            f"x: expected rank 4 ({data_format}) and a kernel of rank 4, got shapes {jnp.shape(x)} "
            f"and {jnp.shape(kernel)}"
        )
    x = jnp.asarray(x)
    is_empty = x.shape[data_format.index("N")] == 0
    runs_dense = isinstance(layout, Dense) or implementation == "dense" or is_empty
    _check_activations(x, data_format, runs_dense)
    is_packed = holds_packed(kernel, layout, packed)
    if is_packed and isinstance(layout, BlockLayout):
        refuse_foreign_values("kernel", kernel, layout)
    if is_packed and kernel_gradient == "dense":
        raise ValueError(
            "kernel_gradient: 'dense' needs the dense kernel, got packed values; unpack them first"
        )
    kernel_shape = layout.shape if isinstance(layout, BlockLayout) else kernel.shape
    cin = x.shape[data_format.index("C")]
    if cin != kernel_shape[2]:
        raise ValueError(
            f"x: expected {kernel_shape[2]} channels ({data_format}, shape {x.shape}) for the "
            f"kernel {kernel_shape}, got {cin}"
        )
    x = with_border(x, kernel_shape[:2], padding, dilation)
    geometry = explicit_geometry(x.shape[1:3], kernel_shape[:2], strides, padding, dilation)
    if isinstance(layout, BlockLayout):
        x, kernel = whole_but_images(CONVOLUTION[data_format][:2], (x, kernel))
    if isinstance(layout, Dense) or runs_dense:
        if isinstance(layout, BlockLayout):
            kernel = _masked_kernel(kernel, layout, is_packed, kernel_gradient)
        elif data_format == "CHWN" and (
            whole := whole_kernel_implementation(
                x, kernel_shape, implementation, **geometry._asdict()
            )
        ):
            return whole_kernel_conv(
                x,
                kernel,
                implementation=whole,
                **geometry._asdict(),
                scale=scale,
                bias=bias,
                residual=residual,
                relu=_is_relu(activation),
                precision=precision,
            )
        y = dense_conv(
            x,
            kernel.astype(x.dtype),
            **geometry._asdict(),
            data_format=data_format,
            precision=precision,
        )
        return finish(y, scale, bias, residual, activation, data_format)
    if plan is not None:
        layout = dataclasses.replace(layout, plan=plan)
    if data_format == "NHWC":
        x = jnp.transpose(x, _TRANSPOSED)
        residual = None if residual is None else jnp.transpose(residual, _TRANSPOSED)
    call = _SparseCall(geometry, implementation, precision)
    if kernel_gradient == "dense":
        x, kernel = reverse_mode_only((x, kernel))
        y = _conv_with_dense_gradient(call, x, kernel, layout)
        y = finish(y, scale, bias, residual, activation, "CHWN")
    else:
        y = _sparse_conv(
            call,
            x,
            kernel if is_packed else pack(kernel, layout),
            layout,
            scale=scale,
            bias=bias,
            residual=residual,
            relu=_is_relu(activation),
        )
    return jnp.transpose(y, _TRANSPOSED) if data_format == "NHWC" else y


def choose_implementation(
    x: Float[Any, "a h w b"],
    layout: BlockLayout | Dense,
    *,
    strides: int | Sequence[int] = (1, 1),
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = (1, 1),
    data_format: DataFormat = "NHWC",
) -> Choice:
    """What `conv(x, kernel, layout, implementation=None)` runs, and why.

    Args:
      x: the input of `conv` (or of `linear`, where the layout is of a dense kernel), or anything
        with its shape and dtype.
      layout: the kernel's layout.
      strides: step in pixels `(y, x)`.
      padding: as in `conv`.
      dilation: distance between taps in pixels `(y, x)`.
      data_format: "NHWC" or "CHWN".

    Returns:
      The implementation's name and the reason, both for the forward pass alone, and in `details`
      what runs without and with gradients.

    Raises:
      ValueError: an argument is unknown or does not fit; the message names it.

    Example:
      >>> import blocksparse_jax as bsj
      >>> layout = bsj.mask_to_layout(jnp.ones((3, 3, 4, 8), bool))
      >>> choose_implementation(jnp.ones((1, 5, 5, 4)), layout).implementation in ("cpu", "xla")
      True
    """
    data_format = _checks.data_format(data_format)
    _check_layout(layout)
    if isinstance(layout, Dense):
        reason = "the kernel has no layout"
        if data_format == "CHWN" and available_implementations()["cpu"] is None:
            reason += ": all of it is kept, in the native kernels where they take its size"
        return Choice("dense", reason, {})
    kh, kw, cin, cout = layout.kernels.conv_shape
    if len(layout.shape) == 2:
        x = jax.ShapeDtypeStruct(images_of_rows(x.shape), x.dtype)
        data_format = "NHWC"
    if x.shape[data_format.index("N")] == 0:
        return Choice("dense", "the batch is empty", {})
    groups, kept, kept_taps, group_size = layout.packed_shape
    _, height, width, _ = jax.eval_shape(
        lambda x: with_border(x, (kh, kw), padding, dilation),
        jax.ShapeDtypeStruct(x.shape, x.dtype),
    ).shape
    geometry = explicit_geometry((height, width), (kh, kw), strides, padding, dilation)
    spec = ConvSpec(
        cin=cin,
        height=height,
        width=width,
        batch=x.shape[data_format.index("N")],
        kernel=(kh, kw),
        cout=cout,
        groups=groups,
        kept=kept,
        kept_taps=kept_taps,
        group_size=group_size,
        **geometry._asdict(),
        dtype=jnp.dtype(x.dtype).name,
        channel_block=layout.channel_block,
    )
    return _choose(spec)


def finish(
    y: Float[Array, "c ho wo d"],
    scale: Float[Array, " cout"] | None,
    bias: Float[Array, " cout"] | None,
    residual: Float[Array, "c ho wo d"] | None,
    activation: str | None,
    data_format: DataFormat,
) -> Float[Array, "c ho wo d"]:
    """`activation(scale * y + bias + residual)`, as in `conv` and with the same errors."""
    channel_axis = data_format.index("C")
    check_epilogue(y.shape, y.shape[channel_axis], scale, bias, residual)
    relu = _is_relu(activation)
    return apply_epilogue(y, scale, bias, residual, relu, channel_axis=channel_axis)


def _is_relu(activation: str | None) -> bool:
    return activation is not None and _checks.choice("activation", activation, ("relu",)) == "relu"


def _check_layout(layout: Any) -> None:
    """ValueError unless it is a layout of one kernel."""
    if not isinstance(layout, BlockLayout | Dense):
        raise ValueError(
            f"layout: expected a BlockLayout or Dense(), got {type(layout).__name__}; get it from "
            f"get_layouts(state)"
        )
    if isinstance(layout, BlockLayout) and (stack := layout.kernels.stack):
        raise ValueError(
            f"layout: expected that of one kernel, got a stack of {stack}; go over kernels and "
            "layouts together with lax.scan or vmap, or take one: jax.tree.map(lambda a: a[0], "
            "layout)"
        )


def _check_activations(x: Array, data_format: str, runs_dense: bool) -> None:
    """ValueError unless the convolution takes activations of this dtype and shape."""
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    if not is_float or not (runs_dense or x.dtype.name in _DTYPES):
        raise ValueError(
            f"x: expected {', '.join(_DTYPES[:2])} or {_DTYPES[2]} ({data_format}), got "
            f"{x.dtype}{list(x.shape)}; cast it"
        )
    if x.size == 0 and not runs_dense:
        raise ValueError(f"x: expected no empty axis ({data_format}), got shape {x.shape}")


def holds_packed(kernel: Array, layout: BlockLayout | Dense, packed: bool | None) -> bool:
    """Whether the kernel holds packed values; ValueError where it fits neither form, or both."""
    if isinstance(layout, Dense):
        if packed:
            raise ValueError(
                "packed: a Dense() layout has no packed values; pass the layout they were packed "
                "with"
            )
        return False
    shapes = {False: layout.shape, True: layout.packed_shape}
    allowed = (False, True) if packed is None else (bool(packed),)
    fitting = [form for form in allowed if kernel.shape == shapes[form]]
    if not fitting:
        names = {False: "the conv kernel", True: "packed values"}
        expected = " or ".join(f"{names[form]} {shapes[form]}" for form in allowed)
        argument = "" if packed is None else f" with packed={packed}"
        if kernel.shape in shapes.values():
            fix = "leave `packed` out, or give the other form"
        else:
            fix = "was the layout made for another layer?"
        raise ValueError(f"kernel: expected {expected}{argument}, got {kernel.shape}; {fix}")
    if len(fitting) == 2:
        raise ValueError(
            f"kernel: {kernel.shape} may be a conv kernel or packed values; say which with "
            f"packed=True or packed=False"
        )
    return fitting[0]


def _masked_kernel(
    kernel: Array, layout: BlockLayout, is_packed: bool, kernel_gradient: str
) -> Array:
    """The dense conv kernel with zeros outside of the mask."""
    if is_packed:
        return unpack(kernel, layout)
    mask = layout_to_mask(layout)
    if kernel_gradient == "dense":
        return straight_through(kernel, mask)
    return jnp.where(mask, kernel, 0)


class _SparseCall(NamedTuple):
    """The static arguments of a block-sparse convolution.

    Attributes:
      geometry: strides, padding and dilation.
      implementation: its name, or None.
      precision: as in `lax.conv_general_dilated`.
    """

    geometry: Geometry
    implementation: str | None
    precision: Any


def _sparse_conv(
    call: _SparseCall, x: Array, values: Array, layout: BlockLayout, **epilogue: Any
) -> Array:
    """Convolves CHWN activations with packed values."""
    return block_sparse_conv(
        x,
        values,
        layout.filters,
        layout.channels,
        layout.taps,
        kernel_shape=layout.kernels.conv_shape,
        **call.geometry._asdict(),
        implementation=call.implementation,
        channel_block=layout.channel_block,
        precision=call.precision,
        plan=layout.plan,
        **epilogue,
    )


class _Residuals(NamedTuple):
    """What the backward pass with the full kernel gradient needs."""

    x: Array
    kernel: Array
    layout: BlockLayout


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv_with_dense_gradient(
    call: _SparseCall, x: Array, kernel: Array, layout: BlockLayout
) -> Array:
    """Convolves with the kept weights; the kernel's gradient is that of all weights."""
    return _sparse_conv(call, x, pack(kernel, layout), layout)


def _dense_gradient_fwd(
    call: _SparseCall, x: Array, kernel: Array, layout: BlockLayout
) -> tuple[Array, _Residuals]:
    x, kernel = reverse_mode_only((x, kernel), OVER_REVERSE)
    y = _conv_with_dense_gradient(call, x, kernel, layout)
    return y, _Residuals(x, kernel, layout)


def _dense_gradient_bwd(
    call: _SparseCall, residuals: _Residuals, dy: Array
) -> tuple[Array, Array, None]:
    x, kernel, layout = residuals
    _, pullback = jax.vjp(lambda x: _sparse_conv(call, x, pack(kernel, layout), layout), x)
    gradient = dense_kernel_gradient(
        x,
        dy,
        layout.shape[:2],
        **call.geometry._asdict(),
        data_format="CHWN",
        precision=call.precision,
    )
    return pullback(dy)[0], gradient.astype(kernel.dtype), None


_conv_with_dense_gradient.defvjp(_dense_gradient_fwd, _dense_gradient_bwd)
