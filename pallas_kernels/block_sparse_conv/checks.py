"""Checks the arguments of a block-sparse convolution against each other."""

import operator
from typing import Any

import jax.numpy as jnp

from pallas_kernels.block_sparse_conv.index import Index
from pallas_kernels.block_sparse_conv.spec import ConvSpec, Pair

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def checked_spec(
    x: Any,
    values: Any,
    index: Index,
    *,
    kernel_shape: Any,
    strides: Any,
    padding: Any,
    dilation: Any,
    channel_block: int,
    precision: Any,
    relu: bool,
) -> ConvSpec:
    """Gathers the static sizes of a convolution.

    Args:
      x: activations `[cin, h, w, n]`.
      values: packed weights.
      index: filters, channels and taps.
      kernel_shape: `(kh, kw, cin, cout)`.
      strides, padding, dilation, channel_block, precision, relu: as in `block_sparse_conv`.

    Returns:
      The static sizes.

    Raises:
      ValueError: an argument does not fit the others; the message names it.

    Example:
      >>> import numpy as np
      >>> x, values = np.ones((4, 5, 5, 2), np.float32), np.ones((1, 2, 1, 2), np.float32)
      >>> index = Index(np.array([[0, 1]]), np.array([[0, 2]]), np.array([[4]]))
      >>> geometry = {"strides": (1, 1), "padding": ((0, 0), (0, 0)), "dilation": (1, 1)}
      >>> options = {"channel_block": 1, "precision": None, "relu": False}
      >>> spec = checked_spec(x, values, index, kernel_shape=(3, 3, 4, 2), **geometry, **options)
      >>> spec.out_shape
      (2, 3, 3, 2)
    """
    _check_arrays(x, values, kernel_shape)
    kh, kw, cin, cout = (int(size) for size in kernel_shape)
    groups, kept, kept_taps, group_size = values.shape
    _check_sizes(x, values, (kh, kw, cin, cout))
    _check_index(index, values)
    if channel_block < 1 or kept % channel_block or cin % channel_block:
        raise ValueError(f"channel_block: {channel_block} must divide kept={kept} and cin={cin}")
    try:
        vertical, horizontal = padding
    except (TypeError, ValueError):
        raise ValueError(
            f"padding: expected ((top, bottom), (left, right)) in pixels, got {padding!r}"
        ) from None
    spec = ConvSpec(
        cin=cin,
        height=x.shape[1],
        width=x.shape[2],
        batch=x.shape[3],
        kernel=(kh, kw),
        cout=cout,
        groups=groups,
        kept=kept,
        kept_taps=kept_taps,
        group_size=group_size,
        strides=_pair("strides", strides, 1),
        dilation=_pair("dilation", dilation, 1),
        padding=(_pair("padding[0]", vertical, 0), _pair("padding[1]", horizontal, 0)),
        dtype=jnp.dtype(x.dtype).name,
        channel_block=int(channel_block),
        precision=precision,
        relu=bool(relu),
    )
    if min(spec.out_size) < 1:
        raise ValueError(
            f"x: images of {x.shape[1:3]} with padding {spec.padding} are smaller than the reach "
            f"of the kernel, {spec.reach} + 1"
        )
    return spec


def _check_arrays(x: Any, values: Any, kernel_shape: Any) -> None:
    """Ranks and dtypes."""
    if x.ndim != 4 or any(size < 1 for size in x.shape) or x.dtype not in DTYPES:
        raise ValueError(
            f"x: expected float32, bfloat16 or float16 [cin, h, w, n] without empty axes, got "
            f"{x.dtype}{list(x.shape)}"
        )
    if not all(isinstance(size, int) for size in x.shape[:3]):
        raise ValueError(
            f"x: only the number of images may be symbolic, got [cin, h, w, n] = {list(x.shape)}; "
            f"export one program for each image size, or use conv(..., implementation='dense')"
        )
    if values.ndim != 4 or not jnp.issubdtype(values.dtype, jnp.floating):
        raise ValueError(
            f"values: expected floats [groups, kept, kept_taps, group_size], got "
            f"{values.dtype}{list(values.shape)}"
        )
    if len(kernel_shape) != 4 or min(kernel_shape) < 1:
        raise ValueError(
            f"kernel_shape: expected (kh, kw, cin, cout) with positive sizes, got "
            f"{tuple(kernel_shape)}"
        )


def _check_sizes(x: Any, values: Any, kernel_shape: tuple[int, int, int, int]) -> None:
    """The input and the packed values belong to the conv kernel."""
    kh, kw, cin, cout = kernel_shape
    groups, kept, kept_taps, group_size = values.shape
    if x.shape[0] != cin:
        raise ValueError(
            f"x: expected (C, H, W, N) with C = {cin} (kernel_shape={kernel_shape}), got shape "
            f"{x.shape}"
        )
    if groups * group_size != cout:
        raise ValueError(
            f"values: groups * group_size = {groups} * {group_size} must be cout={cout} "
            f"(kernel_shape={kernel_shape})"
        )
    if kept > cin or kept_taps > kh * kw:
        raise ValueError(
            f"values: keeps {kept} channels of {cin} and {kept_taps} taps of {kh * kw} (shape "
            f"{values.shape})"
        )


def _check_index(index: Index, values: Any) -> None:
    """The index arrays belong to the packed values."""
    groups, kept, kept_taps, group_size = values.shape
    lengths = Index(filters=group_size, channels=kept, taps=kept_taps)
    for name in Index._fields:
        array = getattr(index, name)
        length = getattr(lengths, name)
        if array.shape != (groups, length) or not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(
                f"{name}: expected integers [{groups}, {length}] beside values {values.shape}, got "
                f"{array.dtype}{array.shape}"
            )


def _pair(name: str, value: Any, least: int) -> Pair:
    """Two integers of at least `least`."""
    try:
        first, second = (operator.index(number) for number in value)
    except (TypeError, ValueError):
        pass
    else:
        if min(first, second) >= least:
            return first, second
    raise ValueError(f"{name}: expected two integers of at least {least}, got {value!r}")
