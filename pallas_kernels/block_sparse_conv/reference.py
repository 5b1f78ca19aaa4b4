"""The implementation "dense", with which every other one is compared.

It scatters the packed values into a dense conv kernel and runs XLA's convolution in (C, H, W, N).
"""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_conv.index import Index
from pallas_kernels.block_sparse_conv.spec import ConvSpec, Implementation
from pallas_kernels.dense_conv import dense_conv


def _dense_kernel(spec: ConvSpec, values: jax.Array, index: Index) -> jax.Array:
    """The dense conv kernel `[kh, kw, cin, cout]` of the packed values."""
    kernel = jnp.zeros((math.prod(spec.kernel), spec.cin, spec.cout), values.dtype)
    kernel = kernel.at[index.positions()].set(values, mode="promise_in_bounds", unique_indices=True)
    return kernel.reshape(spec.kernel_shape)


def _convolve(spec: ConvSpec, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return dense_conv(
        x,
        kernel,
        strides=spec.strides,
        padding=spec.padding,
        dilation=spec.dilation,
        data_format="CHWN",
        precision=spec.precision,
        formulation="xla",
    )


def _forward(
    spec: ConvSpec,
    x: jax.Array,
    values: jax.Array,
    filters: jax.Array,
    channels: jax.Array,
    taps: jax.Array,
) -> jax.Array:
    return _convolve(spec, x, _dense_kernel(spec, values, Index(filters, channels, taps)))


def _input_gradient(
    spec: ConvSpec,
    dy: jax.Array,
    values: jax.Array,
    filters: jax.Array,
    channels: jax.Array,
    taps: jax.Array,
) -> jax.Array:
    kernel = _dense_kernel(spec, values, Index(filters, channels, taps))
    x = jnp.zeros_like(dy, shape=spec.in_shape)
    _, pullback = jax.vjp(lambda x: _convolve(spec, x, kernel), x)
    return pullback(dy)[0]


def _weight_gradient(
    spec: ConvSpec,
    x: jax.Array,
    dy: jax.Array,
    filters: jax.Array,
    channels: jax.Array,
    taps: jax.Array,
) -> jax.Array:
    kernel = jnp.zeros_like(x, shape=spec.kernel_shape)
    _, pullback = jax.vjp(lambda kernel: _convolve(spec, x, kernel), kernel)
    gradient = pullback(dy)[0].reshape(-1, spec.cin, spec.cout)
    positions = Index(filters, channels, taps).positions()
    kept = gradient.at[positions].get(mode="promise_in_bounds", unique_indices=True)
    return kept.astype(jnp.float32)


def _supports(spec: ConvSpec) -> str | None:
    """It runs every convolution."""
    return None


IMPLEMENTATION = Implementation("dense", _supports, _forward, _input_gradient, _weight_gradient)
