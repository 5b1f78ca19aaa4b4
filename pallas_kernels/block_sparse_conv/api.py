"""The door: `block_sparse_conv`."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.block_sparse_conv.checks import checked_spec
from pallas_kernels.block_sparse_conv.choice import resolve
from pallas_kernels.block_sparse_conv.derivative import ByMode, Operands, convolve, whole
from pallas_kernels.block_sparse_conv.epilogue import Epilogue, apply_epilogue, check_epilogue
from pallas_kernels.block_sparse_conv.index import Index
from pallas_kernels.block_sparse_conv.plan import Plan, check_plan
from pallas_kernels.block_sparse_conv.spec import Implementation
from pallas_kernels.reverse_mode import reverse_mode_only
from pallas_kernels.varying import vary_alike


def block_sparse_conv(
    x: Float[Array, "cin h w n"],
    values: Float[Array, "groups kept kept_taps group_size"],
    filters: Int[Array, "groups group_size"],
    channels: Int[Array, "groups kept"],
    taps: Int[Array, "groups kept_taps"],
    *,
    kernel_shape: tuple[int, int, int, int],
    strides: tuple[int, int] = (1, 1),
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0)),
    dilation: tuple[int, int] = (1, 1),
    scale: Float[Array, " cout"] | None = None,
    bias: Float[Array, " cout"] | None = None,
    residual: Float[Array, "cout ho wo n"] | None = None,
    relu: bool = False,
    implementation: str | Implementation | None = None,
    channel_block: int = 1,
    precision: Any = None,
    plan: Plan | None = None,
) -> Float[Array, "cout ho wo n"]:
    """Convolves (C, H, W, N) activations with a conv kernel of which only blocks are kept.

    For each group g, `y[filters[g]] = W_g X_g`, where `W_g` are the `group_size x (kept *
    kept_taps)` packed weights and `X_g` the rows of the padded input at the group's channels,
    shifted by its taps. The result is `relu(scale * y + bias + residual)`; what is None is left
    out. An implementation that can fuses all of it into one pass over memory.

    The gradients with respect to `x` and `values` do only the kept work too. Their own derivatives,
    to any order, are those of the XLA formulation. Forward mode (`jax.jvp`) on the convolution
    itself is a TypeError.

    Args:
      x: activations `[cin, h, w, n]`, float32, bfloat16 or float16.
      values: packed weights `[groups, kept, kept_taps, group_size]`; cast to `x.dtype`, products
        are accumulated in float32.
      filters: a partition of `range(cout)`. All index arrays may be traced: new contents do not
        recompile, and are not checked.
      channels: the kept input channels of each group, without repeats.
      taps: the kept kernel positions `y * kw + x` of each group, without repeats.
      kernel_shape: `(kh, kw, cin, cout)` of the conv kernel.
      strides: step in pixels `(y, x)`.
      padding: zeros around the image in pixels `((top, bottom), (left, right))`.
      dilation: distance between taps in pixels `(y, x)`.
      scale, bias: one number for each output channel.
      residual: added to the output; in its shape.
      relu: whether negative outputs become 0.
      implementation: None picks one (see `choose_implementation`); or a name from
        `available_implementations()`; or an `Implementation` of the caller's own.
      channel_block: channels come in aligned runs of this many.
      precision: as in `jax.lax.dot_general`.
      plan: `make_plan(Index(filters, channels, taps), ...)`, the lists that GPU kernels read; its
        contents are not checked. None: they are made in the step. Implementations without lists
        leave it unread.

    Returns:
      `y [cout, ho, wo, n]` in `x.dtype`.

    Raises:
      ValueError: an argument does not fit the others; the message names it.
      NotImplementedError: the named implementation cannot run this convolution; the message says
        why.

    Example:
      >>> x = jnp.ones((4, 5, 5, 2))
      >>> values = jnp.ones((2, 3, 1, 2))
      >>> filters, channels = jnp.array([[0, 2], [1, 3]]), jnp.array([[0, 1, 2], [1, 2, 3]])
      >>> taps = jnp.array([[4], [0]])
      >>> y = block_sparse_conv(x, values, filters, channels, taps, kernel_shape=(3, 3, 4, 4))
      >>> y.shape, float(y[0, 0, 0, 0])
      ((4, 3, 3, 2), 3.0)

    Reference: the block of Ma et al., "HRBP", CPAL 2024.
    """
    index = Index(filters, channels, taps)
    spec = checked_spec(
        x,
        values,
        index,
        kernel_shape=kernel_shape,
        strides=strides,
        padding=padding,
        dilation=dilation,
        channel_block=channel_block,
        precision=precision,
        relu=relu,
    )
    if plan is not None:
        check_plan(plan, spec.kernel_shape, spec.packed_shape, spec.channel_block)
    implementations = ByMode(
        forward=resolve(dataclasses.replace(spec, gradients=False), implementation),
        training=resolve(dataclasses.replace(spec, gradients=True), implementation),
    )
    epilogue = Epilogue(
        scale=None if scale is None else jnp.asarray(scale, jnp.float32),
        bias=None if bias is None else jnp.asarray(bias, jnp.float32),
        residual=residual,
    )
    check_epilogue(spec.out_shape, spec.cout, *epilogue)
    if residual is not None:
        epilogue = epilogue._replace(residual=residual.astype(x.dtype))
    if values.size == 0:
        zeros = jnp.zeros_like(x, shape=spec.out_shape)
        return apply_epilogue(zeros, *epilogue, relu=spec.relu)
    index = Index(*(jnp.asarray(array, jnp.int32) for array in index))
    x, values, epilogue = reverse_mode_only((x, values, epilogue))
    if not (implementations.forward.plans or implementations.training.plans):
        plan = None
    operands = vary_alike(whole(Operands(x, values, index, epilogue, plan)))
    return convolve(spec, implementations, operands)
