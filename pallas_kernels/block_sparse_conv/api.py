"""The door: argument checks, the choice of an implementation, and the custom derivative."""

import dataclasses
import difflib
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.block_sparse_conv import reference as dense
from pallas_kernels.block_sparse_conv.cpu import launch as cpu
from pallas_kernels.block_sparse_conv.epilogue import apply_epilogue, check_epilogue
from pallas_kernels.block_sparse_conv.mosaic_gpu import launch as mosaic_gpu
from pallas_kernels.block_sparse_conv.spec import Choice, ConvSpec, Implementation
from pallas_kernels.block_sparse_conv.triton import launch as triton
from pallas_kernels.block_sparse_conv.xla import kernels as xla
from pallas_kernels.block_sparse_conv.xla import tiles

IMPLEMENTATIONS: dict[str, Implementation] = {
    module.IMPLEMENTATION.name: module.IMPLEMENTATION
    for module in (xla, cpu, dense, triton, mosaic_gpu)
}


def available_implementations() -> dict[str, str | None]:
    """The implementations by name: None for one that can be used, else the reason why not.

    Returns:
      `{name: None | reason}`.

    Example:
      >>> available_implementations()["xla"] is None
      True
    """
    return dict.fromkeys(IMPLEMENTATIONS) | {
        module.IMPLEMENTATION.name: module.unavailable() for module in (cpu, triton, mosaic_gpu)
    }


def choose_implementation(spec: ConvSpec) -> Choice:
    """What `implementation=None` picks for a convolution, and why: one choice where no gradients
    follow, one where they do.

    Args:
      spec: the static sizes, and whether the gradients follow.

    Returns:
      The name, the reason, and the formulation that runs without and with gradients.

    Example:
      >>> spec = ConvSpec(cin=8, height=5, width=5, batch=2, kernel=(3, 3), cout=8, groups=2, kept=4, kept_taps=3, group_size=4)
      >>> choose_implementation(spec).implementation in ("cpu", "xla")
      True
    """
    details = {
        mode: tiles.choose(dataclasses.replace(spec, gradients=gradients))
        for mode, gradients in tiles.MODES.items()
    }
    if served := [
        name for name in ("mosaic_gpu", "triton") if IMPLEMENTATIONS[name].supports(spec) is None
    ]:
        return Choice(
            "xla",
            f"the GPU kernels are not measured yet; they run by name: "
            f"{' or '.join(map(repr, served))}",
            details,
        )
    absent = cpu.IMPLEMENTATION.supports(spec)
    if absent:
        return Choice("xla", f"the one that does just the kept work here; 'cpu': {absent}", details)
    for mode, gradients in tiles.MODES.items():
        if tiles.native_gain(dataclasses.replace(spec, gradients=gradients)) >= 1:
            details[mode] = cpu.instructions(spec)
    gain = tiles.native_gain(spec)
    if gain < 1:
        return Choice(
            "xla",
            f"1/{1 / gain:.2f} the time of the native kernels at the tuned shapes nearby",
            details,
        )
    return Choice(
        "cpu", f"the native kernels: {gain:.1f}x as fast as XLA at the tuned shapes nearby", details
    )


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
) -> Float[Array, "cout ho wo n"]:
    """Convolves with a conv kernel of which only blocks are kept, in the activation layout (C, H,
    W, N).

    For each group g, `y[filters[g]] = W_g X_g` with `W_g` the `group_size x (kept * kept_taps)`
    packed weights and `X_g` the rows of the padded input at the group's channels, shifted by its
    taps. The result is `relu(scale * y + bias + residual)`, as far as each is given, in one pass
    over memory where the implementation can. The gradients with respect to `x` and `values` do only
    the kept work too; their derivatives, to any order, are those of the XLA formulation. Forward
    mode (`jax.jvp`) on the convolution itself is not defined.

    Args:
      x: activations `[cin, h, w, n]`, float32, bfloat16 or float16.
      values: packed weights `[groups, kept, kept_taps, group_size]`; cast to `x.dtype`, products
        are accumulated in float32.
      filters: a partition of `range(cout)`; as all index arrays it may be traced: new contents do
        not recompile, and are not checked.
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
        `available_implementations()`; or a record of one's own.
      channel_block: channels come in aligned runs of this many.
      precision: as in `jax.lax.dot_general`.

    Returns:
      `y [cout, ho, wo, n]` in `x.dtype`.

    Raises:
      ValueError: an argument does not fit the others; the message names it.
      NotImplementedError: the named implementation cannot serve this convolution; the message says
        why.

    Example:
      >>> x = jnp.ones((4, 5, 5, 2))
      >>> values = jnp.ones((2, 3, 1, 2))
      >>> filters, channels = jnp.array([[0, 2], [1, 3]]), jnp.array([[0, 1, 2], [1, 2, 3]])
      >>> y = block_sparse_conv(x, values, filters, channels, jnp.array([[4], [0]]), kernel_shape=(3, 3, 4, 4))
      >>> y.shape, float(y[0, 0, 0, 0])
      ((4, 3, 3, 2), 3.0)

    Reference: the block of Ma et al., "HRBP", CPAL 2024.
    """
    spec = _spec(
        x,
        values,
        filters,
        channels,
        taps,
        kernel_shape,
        strides,
        padding,
        dilation,
        channel_block,
        precision,
    )
    spec = dataclasses.replace(spec, relu=bool(relu))
    chosen = tuple(
        _resolve(dataclasses.replace(spec, gradients=gradients), implementation)
        for gradients in tiles.MODES.values()
    )
    scale, bias = (None if a is None else jnp.asarray(a, jnp.float32) for a in (scale, bias))
    check_epilogue(spec.out_shape, spec.cout, scale, bias, residual)
    if residual is not None:
        residual = residual.astype(x.dtype)
    if values.size == 0:
        return apply_epilogue(
            jnp.zeros_like(x, shape=spec.out_shape), scale, bias, residual, spec.relu
        )
    index = [jnp.asarray(index, jnp.int32) for index in (filters, channels, taps)]
    return _conv(spec, chosen, *_vary_alike((x, values, *index, scale, bias, residual)))


def _vary_alike(operands: Any) -> Any:
    """Inside shard_map: marks each operand as varying over the mesh axes that any operand varies
    over.
    """
    union = frozenset().union(
        *(jax.typeof(a).manual_axis_type.varying for a in jax.tree.leaves(operands))
    )

    def vary(a: jax.Array) -> jax.Array:
        missing = union - jax.typeof(a).manual_axis_type.varying
        return jax.lax.pcast(a, tuple(missing), to="varying") if missing else a

    return jax.tree.map(vary, operands)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _pass(name, spec, implementation, *operands):
    """One pass, with a derivative: that of XLA's formulation, since native kernels and GPU kernels
    have none. Second derivatives use it.
    """
    return getattr(implementation, name)(spec, *operands)


@_pass.defjvp
def _pass_jvp(name, spec, implementation, primals, tangents):
    def formulation(*operands):
        if name != "forward" or not implementation.fused:
            return getattr(xla.IMPLEMENTATION, name)(spec, *operands)
        return apply_epilogue(
            xla.IMPLEMENTATION.forward(spec, *operands[:5]), *operands[5:], spec.relu
        )

    return _pass(name, spec, implementation, *primals), jax.jvp(formulation, primals, tangents)[1]


def _forward(spec, implementation, x, values, filters, channels, taps, *epilogue):
    operands = (x, values.astype(x.dtype), filters, channels, taps)
    if implementation.fused:
        return _pass("forward", spec, implementation, *operands, *epilogue)
    return apply_epilogue(_pass("forward", spec, implementation, *operands), *epilogue, spec.relu)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _conv(spec, chosen, *operands):
    """`chosen`: the implementations without and with gradients."""
    return _forward(spec, chosen[0], *operands)


def _conv_fwd(spec, chosen, *operands):
    y = _forward(dataclasses.replace(spec, gradients=True), chosen[1], *operands)
    return y, (*operands, y if spec.relu else None)


def _conv_bwd(spec, chosen, saved, dy):
    """With `d` the gradient before the ReLU and V that of the values at scale 1: the scale's is
    `sum_k values V`, the values' `scale V`.
    """
    spec = dataclasses.replace(spec, gradients=True)
    x, values, filters, channels, taps, scale, bias, residual, y = saved
    d = jnp.where(y > 0, dy, 0) if spec.relu else dy
    factor = None if scale is None else scale[filters][:, None, None, :]
    scaled = values if factor is None else values * factor
    dx = _pass(
        "input_gradient", spec, chosen[1], d, scaled.astype(x.dtype), filters, channels, taps
    )
    dvalues = _pass("weight_gradient", spec, chosen[1], x, d, filters, channels, taps)
    dscale = None
    if factor is not None:
        dscale = (
            jnp.zeros_like(scale).at[filters].set((dvalues * values.astype(x.dtype)).sum((1, 2)))
        )
        dvalues *= factor
    dbias = None if bias is None else d.sum((1, 2, 3), dtype=jnp.float32)
    return (
        dx,
        dvalues.astype(values.dtype),
        None,
        None,
        None,
        dscale,
        dbias,
        None if residual is None else d,
    )


_conv.defvjp(_conv_fwd, _conv_bwd)


def _resolve(spec: ConvSpec, wanted: str | Implementation | None) -> Implementation:
    """The implementation; ValueError for an unknown name, NotImplementedError for one that cannot
    serve this convolution.
    """
    if wanted is None:
        wanted = choose_implementation(spec).implementation
    if isinstance(wanted, Implementation):
        implementation, reason = wanted, wanted.supports(spec)
    else:
        names = available_implementations()
        if wanted not in names:
            near = difflib.get_close_matches(str(wanted), names, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"implementation: expected None or one of {', '.join(map(repr, names))}, got "
                f"{wanted!r}{hint}"
            )
        implementation = IMPLEMENTATIONS[wanted]
        reason = implementation.supports(spec)
    if reason:
        raise NotImplementedError(
            f"implementation={wanted if isinstance(wanted, str) else wanted.name!r}: {reason}"
        )
    return implementation


def _pair(name: str, value: Any, least: int) -> tuple[int, int]:
    try:
        pair = tuple(operator.index(v) for v in value)
    except TypeError:
        pair = ()
    if len(pair) != 2 or min(pair) < least:
        raise ValueError(f"{name}: expected two integers of at least {least}, got {value!r}")
    return pair


def _spec(
    x,
    values,
    filters,
    channels,
    taps,
    kernel_shape,
    strides,
    padding,
    dilation,
    channel_block,
    precision,
) -> ConvSpec:
    """Checks the arguments against each other and gathers the static sizes."""
    if x.ndim != 4 or min(x.shape) < 1 or x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(
            f"x: expected float32, bfloat16 or float16 [cin, h, w, n] without empty axes, got "
            f"{x.dtype}{list(x.shape)}"
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
    kh, kw, cin, cout = (int(s) for s in kernel_shape)
    groups, kept, kept_taps, group_size = values.shape
    if x.shape[0] != cin:
        raise ValueError(
            f"x: expected (C, H, W, N) with C = {cin} (kernel_shape={tuple(kernel_shape)}), got "
            f"shape {x.shape}"
        )
    if groups * group_size != cout:
        raise ValueError(
            f"values: groups * group_size = {groups} * {group_size} must be cout={cout} "
            f"(kernel_shape={tuple(kernel_shape)})"
        )
    if kept > cin or kept_taps > kh * kw:
        raise ValueError(
            f"values: keeps {kept} channels of {cin} and {kept_taps} taps of {kh * kw} (shape "
            f"{values.shape})"
        )
    for name, array, length in (
        ("filters", filters, group_size),
        ("channels", channels, kept),
        ("taps", taps, kept_taps),
    ):
        if array.shape != (groups, length) or not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(
                f"{name}: expected integers [{groups}, {length}] beside values {values.shape}, got "
                f"{array.dtype}{array.shape}"
            )
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
    )
    if min(spec.out_shape) < 1:
        raise ValueError(
            f"x: images of {x.shape[1:3]} with padding {spec.padding} are smaller than the reach "
            f"of the kernel, {spec.reach} + 1"
        )
    return spec
