"""conv: the one door to a fast convolution."""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from blocksparse_jax import _checks
from blocksparse_jax.layout import BlockLayout, Dense, layout_to_mask
from blocksparse_jax.masks import straight_through
from blocksparse_jax.packing import pack, unpack
from pallas_kernels.block_sparse_conv import (
    Choice,
    ConvSpec,
    apply_epilogue,
    available_implementations,
    block_sparse_conv,
    check_epilogue,
)
from pallas_kernels.block_sparse_conv import choose_implementation as _choose

DataFormat = Literal["NHWC", "CHWN"]
Padding = str | Sequence[tuple[int, int]]
_DTYPES = ("float32", "bfloat16", "float16")


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
) -> Float[Array, "c ho wo d"]:
    """Convolves with the kept weights of a conv kernel; forward, input gradient and kernel gradient
    do only the kept work.

    Equals `lax.conv_general_dilated(x, where(mask, kernel, 0))` with `mask =
    layout_to_mask(layout)`, then `activation(scale * y + bias + residual)`, as far as each is
    given: at inference a batch norm, a shortcut and a ReLU, which the native kernels do while they
    store y. CHWN is the native activation layout; NHWC is transposed at the door.

    Values that are not finite reach every output that they are multiplied into. What is pruned
    takes no part: its infinities do not show, where a masked dense convolution would multiply them
    by 0. Where a kept weight that is not finite meets the zeros around the image, the native
    kernels give NaN, as a dense convolution does; XLA's formulations may leave those products out.

    Reverse mode works to any order (`jax.grad` of `jax.grad`), and forward over reverse (`jax.jvp`
    of `jax.grad`, Hessian-vector products); from the second order on XLA's operations do the work.
    Forward mode alone (`jax.jvp` of `conv`) takes `implementation="dense"`.

    Args:
      x: activations `[n, h, w, cin]`, or `[cin, h, w, n]` with `data_format="CHWN"`; float32,
        bfloat16 or float16.
      kernel: the conv kernel `[kh, kw, cin, cout]`, or its packed values `[groups, kept, kept_taps,
        group_size]`; cast to `x.dtype`, products are accumulated in float32.
      layout: the kernel's layout; `Dense()` convolves with the whole kernel.
      strides: step in pixels `(y, x)`, or one integer for both.
      padding: "SAME", "VALID" or `((top, bottom), (left, right))` in pixels.
      dilation: distance between taps in pixels `(y, x)`, or one integer for both.
      data_format: "NHWC" or "CHWN", of input and output.
      scale: one number for each output channel.
      bias: likewise.
      residual: added to the output; in its shape.
      activation: "relu" or None.
      implementation: None picks by device, layout and measured tables (`choose_implementation`
        tells what); or one of `available_implementations()`, which says of each whether it can run
        here and why not ("dense": masked weights, dense convolution).
      kernel_gradient: "masked": zero outside the mask; "dense": the full gradient, which RigL and
        dynamic HRBP need at their update steps to grow weights (dense kernels only).
      packed: whether `kernel` holds packed values; None tells by its shape.
      precision: as in `lax.conv_general_dilated`.

    Returns:
      `[n, ho, wo, cout]` or `[cout, ho, wo, n]`, in `x.dtype`.

    Raises:
      ValueError: an argument is unknown or does not fit; the message names it.
      NotImplementedError: the named implementation cannot serve this call, with the reason.

    Example:
      >>> import blocksparse_jax as bsj
      >>> mask = jnp.zeros((3, 3, 4, 8), bool).at[:, :, :2, :4].set(True).at[:, :, 2:, 4:].set(True)
      >>> layout, kernel = bsj.mask_to_layout(mask), jnp.ones((3, 3, 4, 8))
      >>> conv(jnp.ones((1, 5, 5, 4)), kernel, layout)[0, 2, 2].tolist()
      [18.0, 18.0, 18.0, 18.0, 18.0, 18.0, 18.0, 18.0]

    Reference: HRBP's accelerated training, Ma et al., CPAL 2024.
    """
    data_format = _checks.data_format(data_format)
    _checks.choice("kernel_gradient", kernel_gradient, ("masked", "dense"))
    if implementation is not None:
        _checks.choice("implementation", implementation, available_implementations())
    if not isinstance(layout, BlockLayout | Dense):
        raise ValueError(
            f"layout: expected a BlockLayout or Dense(), got {type(layout).__name__}; get it from "
            f"get_layouts(state)"
        )
    if jnp.ndim(x) != 4 or jnp.ndim(kernel) != 4:
        raise ValueError(
            f"x: expected rank 4 ({data_format}) and a kernel of rank 4, got shapes {jnp.shape(x)} "
            f"and {jnp.shape(kernel)}"
        )
    x, runs_dense = jnp.asarray(x), isinstance(layout, Dense) or implementation == "dense"
    if not (jnp.issubdtype(x.dtype, jnp.floating) if runs_dense else x.dtype.name in _DTYPES):
        raise ValueError(
            f"x: expected {', '.join(_DTYPES[:2])} or {_DTYPES[2]} ({data_format}), got "
            f"{x.dtype}{list(x.shape)}; cast it"
        )
    if x.size == 0 and not runs_dense:
        raise ValueError(f"x: expected no empty axis ({data_format}), got shape {x.shape}")
    is_packed = _is_packed(kernel, layout, packed)
    if is_packed and kernel_gradient == "dense":
        raise ValueError(
            "kernel_gradient: 'dense' needs the dense kernel, got packed values; unpack them first"
        )
    kernel_size = layout.shape if isinstance(layout, BlockLayout) else kernel.shape
    cin = x.shape[_channel_axis(data_format)]
    if cin != kernel_size[2]:
        raise ValueError(
            f"x: expected {kernel_size[2]} channels ({data_format}, shape {x.shape}) for the "
            f"kernel {kernel_size}, got {cin}"
        )
    window = _window(x, kernel_size, strides, padding, dilation, data_format)
    if isinstance(layout, Dense) or runs_dense:
        if isinstance(layout, BlockLayout):
            kernel = (
                unpack(kernel, layout) if is_packed else _masked(kernel, layout, kernel_gradient)
            )
        y = dense_conv(x, kernel.astype(x.dtype), *window, data_format, precision)
        return finish(y, scale, bias, residual, activation, data_format)
    if data_format == "NHWC":
        x = jnp.transpose(x, (3, 1, 2, 0))
        residual = None if residual is None else jnp.transpose(residual, (3, 1, 2, 0))
    static = (*window, implementation, precision)
    if kernel_gradient == "dense":
        y = finish(
            _conv_full_gradient(static, x, kernel, layout),
            scale,
            bias,
            residual,
            activation,
            "CHWN",
        )
    else:
        values = kernel if is_packed else pack(kernel, layout)
        y = _sparse(
            static,
            x,
            values,
            layout,
            scale=scale,
            bias=bias,
            residual=residual,
            relu=_is_relu(activation),
        )
    return jnp.transpose(y, (3, 1, 2, 0)) if data_format == "NHWC" else y


def dense_kernel_gradient(
    x: Float[Array, "a h w b"],
    dy: Float[Array, "c ho wo d"],
    kernel_size: Sequence[int],
    *,
    strides: int | Sequence[int] = (1, 1),
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = (1, 1),
    data_format: DataFormat = "NHWC",
    precision: Any = None,
) -> Float[Array, "kh kw cin cout"]:
    """The gradient with respect to the whole kernel, pruned weights too: what dynamic methods grow
    by.

    Args:
      x: the convolution's input.
      dy: the gradient with respect to its output, in the same data format.
      kernel_size: `(kh, kw)`.
      strides: step in pixels `(y, x)`.
      padding: "SAME", "VALID" or `((top, bottom), (left, right))` in pixels.
      dilation: distance between taps in pixels `(y, x)`.
      data_format: "NHWC" or "CHWN".
      precision: as in `lax.conv_general_dilated`.

    Returns:
      `[kh, kw, cin, cout]` in `x.dtype`.

    Raises:
      ValueError: an argument is unknown, or `dy` does not fit `x`.

    Example:
      >>> dense_kernel_gradient(jnp.ones((1, 4, 4, 2)), jnp.ones((1, 4, 4, 3)), (3, 3)).shape
      (3, 3, 2, 3)

    Reference: the growth score of Evci et al., "RigL", ICML 2020.
    """
    data_format = _checks.data_format(data_format)
    axis = _channel_axis(data_format)
    if len(kernel_size) != 2:
        raise ValueError(f"kernel_size: expected (kh, kw), got {tuple(kernel_size)}")
    shape = (*kernel_size, x.shape[axis], dy.shape[axis])
    window = _window(x, shape, strides, padding, dilation, data_format)

    def forward(kernel: Array) -> Array:
        return dense_conv(x, kernel, *window, data_format, precision)

    y = jax.eval_shape(forward, jax.ShapeDtypeStruct(shape, x.dtype))
    if y.shape != dy.shape:
        raise ValueError(f"dy: expected the convolution's output shape {y.shape}, got {dy.shape}")
    return jax.linear_transpose(forward, jax.ShapeDtypeStruct(shape, x.dtype))(dy.astype(y.dtype))[
        0
    ]


def choose_implementation(
    x: Float[Any, "a h w b"],
    layout: BlockLayout,
    *,
    strides: int | Sequence[int] = (1, 1),
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = (1, 1),
    data_format: DataFormat = "NHWC",
) -> Choice:
    """What `conv(x, kernel, layout, implementation=None)` runs, and why.

    Args:
      x: the input, or anything with its shape and dtype.
      layout: the kernel's layout.
      strides: step in pixels `(y, x)`.
      padding: "SAME", "VALID" or `((top, bottom), (left, right))` in pixels.
      dilation: distance between taps in pixels `(y, x)`.
      data_format: "NHWC" or "CHWN".

    Returns:
      The implementation's name and the reason, both for the forward pass alone, and in `details`
      what runs without and with gradients.

    Example:
      >>> import blocksparse_jax as bsj
      >>> layout = bsj.mask_to_layout(jnp.ones((3, 3, 4, 8), bool))
      >>> choose_implementation(jnp.ones((1, 5, 5, 4)), layout).implementation in ("cpu", "xla")
      True
    """
    data_format = _checks.data_format(data_format)
    stride, pads, spread = _window(x, layout.shape, strides, padding, dilation, data_format)
    h, w = x.shape[1:3]
    batch = x.shape[3 if data_format == "CHWN" else 0]
    groups, kept, kept_taps, group_size = layout.packed_shape
    kh, kw, cin, cout = layout.shape
    return _choose(
        ConvSpec(
            cin,
            h,
            w,
            batch,
            (kh, kw),
            cout,
            groups,
            kept,
            kept_taps,
            group_size,
            stride,
            pads,
            spread,
            jnp.dtype(x.dtype).name,
            layout.channel_block,
        )
    )


def finish(
    y: Float[Array, "c ho wo d"],
    scale: Float[Array, " cout"] | None,
    bias: Float[Array, " cout"] | None,
    residual: Float[Array, "c ho wo d"] | None,
    activation: str | None,
    data_format: DataFormat,
) -> Float[Array, "c ho wo d"]:
    """What follows a dense convolution: `activation(scale * y + bias + residual)`, as in `conv`,
    with the same errors.
    """
    axis = _channel_axis(data_format)
    check_epilogue(y.shape, y.shape[axis], scale, bias, residual)
    return apply_epilogue(y, scale, bias, residual, _is_relu(activation), channel_axis=axis)


def dense_conv(
    x: Float[Array, "a h w b"],
    kernel: Float[Array, "kh kw cin cout"],
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
    dilation: tuple[int, int],
    data_format: DataFormat,
    precision: Any = None,
) -> Float[Array, "c ho wo d"]:
    """The dense convolution in either data format (`lax.conv_general_dilated`)."""
    dims = (data_format, "HWIO", data_format)
    # Past the kernel's reach XLA's input gradient on a CPU reads memory that nobody wrote (jax
    # 0.10.2): those zeros are explicit.
    past = [
        tuple(max(0, p - (k - 1) * d) for p in pads)
        for pads, k, d in zip(padding, kernel.shape[:2], dilation, strict=True)
    ]
    if any(map(any, past)):
        spatial = data_format.index("H")
        x = jnp.pad(
            x, [past[axis - spatial] if 0 <= axis - spatial < 2 else (0, 0) for axis in range(4)]
        )
        padding = tuple((p[0] - q[0], p[1] - q[1]) for p, q in zip(padding, past, strict=True))  # type: ignore[assignment]
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=dims,
        precision=precision,
    )


def _is_relu(activation: str | None) -> bool:
    return activation is not None and _checks.choice("activation", activation, ("relu",)) == "relu"


def _channel_axis(data_format: DataFormat) -> int:
    return data_format.index("C")


def _is_packed(kernel: Array, layout: BlockLayout | Dense, packed: bool | None) -> bool:
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
    fits = [form for form in allowed if kernel.shape == shapes[form]]
    if not fits:
        expected = " or ".join(
            f"{'packed values' if form else 'the conv kernel'} {shapes[form]}" for form in allowed
        )
        said = "" if packed is None else f" with packed={packed}"
        fix = (
            "was the layout made for another layer?"
            if kernel.shape not in shapes.values()
            else "leave `packed` out, or give the other form"
        )
        raise ValueError(f"kernel: expected {expected}{said}, got {kernel.shape}; {fix}")
    if len(fits) == 2:
        raise ValueError(
            f"kernel: {kernel.shape} may be a conv kernel or packed values; say which with "
            f"packed=True or packed=False"
        )
    return fits[0]


def _window(
    x: Any,
    shape: Sequence[int],
    strides: int | Sequence[int],
    padding: Padding,
    dilation: int | Sequence[int],
    data_format: DataFormat,
) -> tuple[tuple[int, int], tuple[tuple[int, int], tuple[int, int]], tuple[int, int]]:
    """Strides, explicit padding and dilation as tuples of ints."""
    stride, spread = _checks.pair("strides", strides), _checks.pair("dilation", dilation)
    pads: Padding = padding
    if isinstance(padding, str):
        reach = [(k - 1) * d + 1 for k, d in zip(shape[:2], spread, strict=True)]
        pads = lax.padtype_to_pads(
            x.shape[1:3],
            reach,
            stride,
            _checks.choice("padding", padding.upper(), ("SAME", "VALID")),
        )
    try:
        (top, bottom), (left, right) = pads  # type: ignore[str-unpack]
        explicit = ((int(top), int(bottom)), (int(left), int(right)))
    except (TypeError, ValueError):
        raise ValueError(
            f'padding: expected "SAME", "VALID" or ((top, bottom), (left, right)), got {padding!r}'
        ) from None
    if min(map(min, explicit)) < 0:
        raise ValueError(f"padding: expected pixels of at least 0, got {padding!r}; crop x instead")
    return stride, explicit, spread


def _masked(kernel: Array, layout: BlockLayout, kernel_gradient: str) -> Array:
    mask = layout_to_mask(layout)
    return (
        straight_through(kernel, mask) if kernel_gradient == "dense" else jnp.where(mask, kernel, 0)
    )


def _sparse(static: Any, x: Array, values: Array, layout: BlockLayout, **epilogue: Any) -> Array:
    strides, padding, dilation, implementation, precision = static
    return block_sparse_conv(
        x,
        values,
        layout.filters,
        layout.channels,
        layout.taps,
        kernel_shape=layout.shape,
        strides=strides,
        padding=padding,
        dilation=dilation,
        implementation=implementation,
        channel_block=layout.channel_block,
        precision=precision,
        **epilogue,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv_full_gradient(static: Any, x: Array, kernel: Array, layout: BlockLayout) -> Array:
    return _sparse(static, x, pack(kernel, layout), layout)


def _full_forward(static: Any, x: Array, kernel: Array, layout: BlockLayout) -> tuple[Array, Any]:
    return _conv_full_gradient(static, x, kernel, layout), (x, kernel, layout)


def _full_backward(static: Any, saved: Any, dy: Array) -> tuple[Array, Array, None]:
    x, kernel, layout = saved
    strides, padding, dilation, _, precision = static
    _, input_vjp = jax.vjp(lambda x: _sparse(static, x, pack(kernel, layout), layout), x)
    kernel_gradient = dense_kernel_gradient(
        x,
        dy,
        layout.shape[:2],
        strides=strides,
        padding=padding,
        dilation=dilation,
        data_format="CHWN",
        precision=precision,
    )
    return input_vjp(dy)[0], kernel_gradient.astype(kernel.dtype), None


_conv_full_gradient.defvjp(_full_forward, _full_backward)
