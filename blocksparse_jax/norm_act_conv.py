"""Convolutions between batch norms in training: outputs travel raw, with their sums.

    z, sums = conv_with_sums(images, stem, Dense())
    z, sums = norm_act_conv(z, sums, scale, bias, kernel, layout)
    x = norm_act_apply(z, sums, scale, bias)  # for whoever needs activations

computes what `conv`, `flax.linen.BatchNorm` and `relu` in turn compute, values and gradients. The
Triton kernels sum what they write, and their input gradient goes on through the ReLU and the batch
norm below, so that these cost hardly a pass over memory; they do so wherever they run a
convolution, named or chosen. Every other implementation convolves in its own kernels, and XLA's
operations do the rest.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from blocksparse_jax import _checks
from blocksparse_jax.conv import conv, holds_packed
from blocksparse_jax.geometry import Padding, explicit_geometry
from blocksparse_jax.layout import BlockLayout
from blocksparse_jax.layout_nodes import Dense
from blocksparse_jax.packing import pack
from pallas_kernels import batch_norm
from pallas_kernels.batch_norm import Norm, NormSpec
from pallas_kernels.block_sparse_conv import (
    Index,
    available_implementations,
    fuses_norms,
    norm_implementation,
)
from pallas_kernels.block_sparse_conv import norm_act_conv as _fused_norm_act_conv

__all__ = [
    "conv_with_sums",
    "mean_and_variance",
    "norm_act_apply",
    "norm_act_conv",
    "norm_add_act_conv",
]


def conv_with_sums(
    x: Float[Array, "a h w b"],
    kernel: Float[Array, "p q r s"],
    layout: BlockLayout | Dense,
    **options: Any,
) -> tuple[Float[Array, "c ho wo d"], Float[Array, "2 cout"]]:
    """Convolves, and sums the output over each channel, for the batch norm that reads it.

    Args:
      x: activations, as in `conv`.
      kernel: as in `conv`.
      layout: as in `conv`.
      **options: `strides`, `padding`, `dilation`, `data_format`, `implementation`,
        `kernel_gradient`, `packed`, `precision` and `plan` of `conv`.

    Returns:
      The output, and its sums `[2, cout]` in float32: of each channel's values and of their
      squares. Under `jax.jit` the sums are over the whole batch, on all devices; inside
      `jax.shard_map` over the device's images, and `jax.lax.pmean(sums, axis)` makes batch norm a
      synchronised one.

    Raises:
      ValueError: as in `conv`.
      NotImplementedError: likewise.

    Example:
      >>> import blocksparse_jax as bsj
      >>> z, sums = conv_with_sums(jnp.ones((2, 4, 4, 3)), jnp.ones((1, 1, 3, 8)), bsj.Dense())
      >>> sums[:, 0].tolist()
      [96.0, 288.0]
    """
    x = jnp.asarray(x)
    if (call := _fused_call(x, kernel, layout, **options)) is not None:
        return _fused_norm_act_conv(x, None, None, norm_spec=NormSpec(), **call)[1:]
    axis = _channel_axis(options.get("data_format", "NHWC"))
    return batch_norm.with_sums(axis, conv(x, kernel, layout, **options))


def sums_of(
    z: Float[Array, "a h w b"], data_format: str
) -> tuple[Float[Array, "a h w b"], Float[Array, "2 c"]]:
    """An activation and its sums, as `conv_with_sums` gives them."""
    return batch_norm.with_sums(_channel_axis(data_format), z)


def norm_act_conv(
    z: Float[Array, "a h w b"],
    sums: Float[Array, "2 cin"],
    scale: Float[Array, " cin"],
    bias: Float[Array, " cin"],
    kernel: Float[Array, "p q r s"],
    layout: BlockLayout | Dense,
    *,
    relu: bool = True,
    epsilon: float = 1e-5,
    **options: Any,
) -> tuple[Float[Array, "c ho wo d"], Float[Array, "2 cout"]]:
    """Batch norm, ReLU and convolution: from one raw output with its sums to the next.

    With mean m and variance v of each channel, from the sums, it convolves `relu(scale * (z - m) /
    sqrt(v + epsilon) + bias)`. The gradients through m and v are those of the sums.

    Args:
      z: the raw output of a convolution, in the data format.
      sums: of z, as `conv_with_sums` gives them.
      scale: of the batch norm, one number for each channel of z.
      bias: of the batch norm, likewise.
      kernel: as in `conv`.
      layout: as in `conv`.
      relu: whether a ReLU follows the batch norm.
      epsilon: added to the variance.
      **options: as in `conv_with_sums`; `implementation="triton"` has fused passes, in CHWN.

    Returns:
      The convolution's raw output, and its sums.

    Raises:
      ValueError: an argument does not fit; the message names it.
      NotImplementedError: the named implementation cannot run this call, with the reason.

    Example:
      >>> import blocksparse_jax as bsj
      >>> z = jnp.array([1.0, 3.0]).reshape(2, 1, 1, 1)
      >>> _, sums = conv_with_sums(z, jnp.ones((1, 1, 1, 1)), bsj.Dense())
      >>> one, kernel = jnp.ones(1), jnp.full((1, 1, 1, 1), 5.0)
      >>> y, _ = norm_act_conv(z, sums, one, 0 * one, kernel, bsj.Dense(), epsilon=0.0)
      >>> y.ravel().tolist()
      [0.0, 5.0]

    Reference: Ioffe & Szegedy, "Batch normalization", ICML 2015, for the norm and its gradient.
    """
    norm_spec = NormSpec(relu, epsilon)
    return _norm_conv(z, (sums, scale, bias), None, kernel, layout, norm_spec, False, options)[1:]


def norm_add_act_conv(
    z: Float[Array, "a h w b"],
    sums: Float[Array, "2 cin"],
    scale: Float[Array, " cin"],
    bias: Float[Array, " cin"],
    shortcut: Float[Array, "a h w b"] | None,
    kernel: Float[Array, "p q r s"],
    layout: BlockLayout | Dense,
    *,
    relu: bool = True,
    epsilon: float = 1e-5,
    **options: Any,
) -> tuple[Float[Array, "a h w b"], Float[Array, "c ho wo d"], Float[Array, "2 cout"]]:
    """Batch norm, shortcut, ReLU and convolution, for the first convolution of a residual block.

    It is `norm_act_conv` that adds a shortcut before the ReLU and also returns the activations that
    it convolves, which the block's own shortcut reads.

    Args:
      z: the raw output of a convolution, in the data format.
      sums: of z, as `conv_with_sums` gives them.
      scale: one number for each channel of z.
      bias: likewise.
      shortcut: in the shape of z; None where there is none, as after a stem.
      kernel: as in `conv`.
      layout: as in `conv`.
      relu: whether a ReLU follows the sum.
      epsilon: added to the variance.
      **options: as in `norm_act_conv`.

    Returns:
      `x = relu(norm(z) + shortcut)`, the convolution's raw output, and its sums.

    Raises:
      ValueError: an argument does not fit; the message names it.
      NotImplementedError: the named implementation cannot run this call, with the reason.

    Example:
      >>> import blocksparse_jax as bsj
      >>> z = jnp.array([1.0, 3.0]).reshape(2, 1, 1, 1)
      >>> _, sums = conv_with_sums(z, jnp.ones((1, 1, 1, 1)), bsj.Dense())
      >>> norm, kernel = (sums, jnp.ones(1), jnp.zeros(1)), jnp.full((1, 1, 1, 1), 5.0)
      >>> x, y, _ = norm_add_act_conv(z, *norm, z, kernel, bsj.Dense(), epsilon=0.0)
      >>> x.ravel().tolist(), y.ravel().tolist()
      ([0.0, 4.0], [0.0, 20.0])
    """
    norm_spec = NormSpec(relu, epsilon)
    return _norm_conv(z, (sums, scale, bias), shortcut, kernel, layout, norm_spec, True, options)


def norm_act_apply(
    z: Float[Array, "a h w b"],
    sums: Float[Array, "2 c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    shortcut: Float[Array, "a h w b"] | None = None,
    *,
    relu: bool = True,
    epsilon: float = 1e-5,
    data_format: str = "NHWC",
) -> Float[Array, "a h w b"]:
    """Batch norm, shortcut and ReLU of a raw output, for pools and whoever else needs activations.

    `norm_act` does the same without sums: it takes the statistics from the activations.

    Args:
      z: the raw output of a convolution, in the data format.
      sums: of z, as `conv_with_sums` gives them.
      scale: one number for each channel.
      bias: likewise.
      shortcut: in the shape of z, or None.
      relu: whether a ReLU follows.
      epsilon: added to the variance.
      data_format: "NHWC" or "CHWN".

    Returns:
      `relu(norm(z) + shortcut)` in the dtype of z, computed at least in float32.

    Raises:
      ValueError: an argument does not fit; the message names it.

    Example:
      >>> z = jnp.array([1.0, 3.0]).reshape(2, 1, 1, 1)
      >>> sums = jnp.array([[4.0], [10.0]])
      >>> norm_act_apply(z, sums, jnp.ones(1), jnp.zeros(1), epsilon=0.0).ravel().tolist()
      [0.0, 1.0]
    """
    axis = _channel_axis(data_format)
    norm, shortcut = _checked(z, (sums, scale, bias), shortcut, axis)
    return batch_norm.norm_act_apply(NormSpec(relu, epsilon, axis), z, norm, shortcut)


def norm_act_max_pool(
    z: Float[Array, "a h w b"],
    sums: Float[Array, "2 c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    size: int,
    *,
    relu: bool,
    epsilon: float,
    data_format: str,
) -> Float[Array, "a ho wo b"]:
    """The maxima of the tiles of `norm_act_apply(z, sums, scale, bias)`."""
    axis = _channel_axis(data_format)
    norm, _ = _checked(z, (sums, scale, bias), None, axis)
    return batch_norm.norm_act_max_pool(NormSpec(relu, epsilon, axis), z, norm, size)


def mean_and_variance(
    sums: Float[Array, "2 c"], count: int
) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
    """The statistics of each channel, as `flax.linen.BatchNorm` computes them.

    Args:
      sums: as `conv_with_sums` gives them.
      count: values of a channel: images times pixels.

    Returns:
      The mean and the (biased) variance.

    Raises:
      ValueError: the sums are not `[2, c]`, or the count is no positive integer.

    Example:
      >>> mean, variance = mean_and_variance(jnp.array([[4.0], [10.0]]), 2)
      >>> mean.tolist(), variance.tolist()
      ([2.0], [1.0])
    """
    if jnp.ndim(sums) != 2 or len(sums) != 2:
        raise ValueError(f"sums: expected [2, c], got shape {jnp.shape(sums)}; see conv_with_sums")
    return batch_norm.mean_and_variance(sums, _checks.positive_int("count", count))


def _norm_conv(
    z: Array,
    arrays: tuple[Array, Array, Array],
    shortcut: Array | None,
    kernel: Array,
    layout: BlockLayout | Dense,
    norm_spec: NormSpec,
    with_input: bool,
    options: dict[str, Any],
) -> tuple[Any, Array, Array]:
    """Input, output and sums of a convolution between batch norms."""
    axis = _channel_axis(options.get("data_format", "NHWC"))
    norm_spec = dataclasses.replace(norm_spec, channel_axis=axis)
    norm, shortcut = _checked(z, arrays, shortcut, axis)
    if (call := _fused_call(z, kernel, layout, **options)) is not None:
        return _fused_norm_act_conv(
            z, norm, shortcut, norm_spec=norm_spec, with_input=with_input, **call
        )
    x = batch_norm.norm_act_apply(norm_spec, z, norm, shortcut)
    return x, *batch_norm.with_sums(axis, conv(x, kernel, layout, **options))


def _fused_call(
    x: Array,
    kernel: Array,
    layout: BlockLayout | Dense,
    *,
    strides: int | Sequence[int] = (1, 1),
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = (1, 1),
    data_format: str = "NHWC",
    implementation: str | None = None,
    kernel_gradient: str = "masked",
    packed: bool | None = None,
    precision: Any = None,
    plan: Any = None,
) -> dict[str, Any] | None:
    """The arguments of the fused passes; None where `conv` runs, which checks its arguments."""
    if implementation is not None:
        _checks.implementation(implementation, available_implementations())
    if not fuses_norms(implementation) or not isinstance(layout, BlockLayout):
        return None
    is_plain = len(layout.shape) == 4 and not layout.kernels.stack and x.ndim == 4 and x.size > 0
    pads_zeros = not isinstance(padding, str) or padding.upper() not in ("CIRCULAR", "REFLECT")
    fits = data_format == "CHWN" and kernel_gradient == "masked" and pads_zeros and is_plain
    if not fits or jnp.ndim(kernel) != 4:
        return None
    is_packed = holds_packed(kernel, layout, packed)
    if 0 in layout.packed_shape:
        return None
    shape = layout.kernels.conv_shape
    geometry = explicit_geometry(x.shape[1:3], shape[:2], strides, padding, dilation)
    index = Index(layout.filters, layout.channels, layout.taps)
    call = {
        "kernel_shape": shape,
        **geometry._asdict(),
        "channel_block": layout.channel_block,
        "precision": precision,
    }
    values = jax.ShapeDtypeStruct(layout.packed_shape, kernel.dtype)
    chosen = norm_implementation(implementation, x, values, index, **call)
    if chosen is None:
        return None
    return {
        "values": kernel if is_packed else pack(kernel, layout),
        **index._asdict(),
        **call,
        "implementation": chosen,
        "plan": layout.plan if plan is None else plan,
    }


def _checked(
    z: Array, arrays: tuple[Array, Array, Array], shortcut: Array | None, axis: int
) -> tuple[Norm, Array | None]:
    """The norm of an activation; ValueError unless its arrays and the shortcut fit."""
    if jnp.ndim(z) != 4:
        raise ValueError(f"z: expected the raw output of a convolution, got shape {jnp.shape(z)}")
    channels = z.shape[axis]
    for name, array, shape in zip(
        ("sums", "scale", "bias"), arrays, ((2, channels), (channels,), (channels,))
    ):
        if jnp.shape(array) != shape:
            raise ValueError(
                f"{name}: expected shape {shape} for the {channels} channels of z {z.shape}, got "
                f"{jnp.shape(array)}"
            )
    if shortcut is not None and shortcut.shape != z.shape:
        raise ValueError(f"shortcut: expected the shape of z, {z.shape}, got {shortcut.shape}")
    sums, scale, bias = arrays
    norm = Norm(sums, scale.astype(sums.dtype), bias.astype(sums.dtype))
    return norm, None if shortcut is None else shortcut.astype(z.dtype)


def _channel_axis(data_format: str) -> int:
    return 0 if _checks.data_format(data_format) == "CHWN" else 3
