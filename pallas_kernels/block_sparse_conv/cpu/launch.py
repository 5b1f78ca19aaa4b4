"""The implementation "cpu": native C++ kernels, called through `jax.ffi` on XLA's thread pool."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse_conv.cpu import kernels
from pallas_kernels.block_sparse_conv.spec import ConvSpec, Implementation
from pallas_kernels.varying import result_type

DTYPES = ("float32", "bfloat16")


def unavailable() -> str | None:
    """Why the native kernels cannot run here.

    Returns:
      None where they can, else the reason.
    """
    library = kernels.library()
    if isinstance(library, str):
        return library
    if jax.default_backend() != "cpu":
        return f"runs on CPUs, and JAX's default device here is {jax.default_backend()!r}"
    return None


def instructions(spec: ConvSpec) -> str:
    """The instructions that the products of a convolution run on.

    Args:
      spec: the static sizes and the dtype.

    Returns:
      avx512_bf16 (for bfloat16 alone), avx512, avx2 or portable.
    """
    variant = kernels.variant()
    return variant if spec.dtype == "bfloat16" else variant.removesuffix("_bf16")


def _supports(spec: ConvSpec) -> str | None:
    if reason := unavailable():
        return reason
    if spec.dtype not in DTYPES:
        return f"computes in {' and '.join(DTYPES)}, not in {spec.dtype}; cast x, or use 'xla'"
    return None


def _call(
    pass_name: str,
    spec: ConvSpec,
    shape: tuple[int, ...],
    dtype: str,
    *operands: jax.Array,
    **attributes: Any,
) -> jax.Array:
    """Calls one of the handlers of `cpu_kernels/handlers.cc`.

    `variant=""` lets the machine that runs the program pick one, which need not be the machine that
    compiles it.
    """
    (top, bottom), (left, right) = spec.padding
    geometry = {
        "kernel": spec.kernel,
        "strides": spec.strides,
        "padding": (top, left, bottom, right),
        "dilation": spec.dilation,
    }
    for name, numbers in geometry.items():
        attributes[name] = np.asarray(numbers, np.int64)
    call = jax.ffi.ffi_call(
        kernels.TARGETS[pass_name],
        result_type(operands[0], shape, dtype),
        vmap_method="sequential",
    )
    return call(*operands, variant=kernels.forced_variant(), **attributes)


def _forward(
    spec: ConvSpec,
    x: jax.Array,
    values: jax.Array,
    filters: jax.Array,
    channels: jax.Array,
    taps: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """In the handler's interface an absent part of the epilogue is an array without elements."""
    scale = jnp.zeros(0, jnp.float32) if scale is None else scale
    bias = jnp.zeros(0, jnp.float32) if bias is None else bias
    residual = jnp.zeros((0, 0, 0, 0), x.dtype) if residual is None else residual
    operands = (x, values, filters, channels, taps, scale, bias, residual)
    return _call("forward", spec, spec.out_shape, spec.dtype, *operands, relu=spec.relu)


def _input_gradient(
    spec: ConvSpec,
    dy: jax.Array,
    values: jax.Array,
    filters: jax.Array,
    channels: jax.Array,
    taps: jax.Array,
) -> jax.Array:
    operands = (dy, values, filters, channels, taps)
    return _call("input_gradient", spec, spec.in_shape, spec.dtype, *operands)


def _weight_gradient(
    spec: ConvSpec,
    x: jax.Array,
    dy: jax.Array,
    filters: jax.Array,
    channels: jax.Array,
    taps: jax.Array,
) -> jax.Array:
    operands = (x, dy, filters, channels, taps)
    return _call("weight_gradient", spec, spec.packed_shape, "float32", *operands)


IMPLEMENTATION = Implementation(
    "cpu", _supports, _forward, _input_gradient, _weight_gradient, fused=True
)
