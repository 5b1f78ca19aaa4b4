"""The dense implementation: scatter the packed values into a dense conv kernel and run XLA's
convolution in (C, H, W, N).
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_conv.spec import ConvSpec, Implementation

CHWN = ("CHWN", "HWIO", "CHWN")


def _index(
    filters: jax.Array, channels: jax.Array, taps: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    return taps[:, None, :, None], channels[:, :, None, None], filters[:, None, None, :]


def _kernel(spec: ConvSpec, values: jax.Array, *index: jax.Array) -> jax.Array:
    """The dense conv kernel `[kh, kw, cin, cout]` of the packed values."""
    kernel = jnp.zeros((spec.kernel[0] * spec.kernel[1], spec.cin, spec.cout), values.dtype)
    kernel = kernel.at[_index(*index)].set(values, mode="promise_in_bounds", unique_indices=True)
    return kernel.reshape(*spec.kernel, spec.cin, spec.cout)


def _convolve(spec: ConvSpec, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        spec.strides,
        spec.padding,
        rhs_dilation=spec.dilation,
        dimension_numbers=CHWN,
        precision=spec.precision,
    )


def _forward(spec: ConvSpec, x, values, filters, channels, taps):
    return _convolve(spec, x, _kernel(spec, values, filters, channels, taps))


def _input_gradient(spec: ConvSpec, dy, values, filters, channels, taps):
    kernel = _kernel(spec, values, filters, channels, taps)
    return jax.vjp(lambda x: _convolve(spec, x, kernel), jnp.zeros_like(dy, shape=spec.in_shape))[
        1
    ](dy)[0]


def _weight_gradient(spec: ConvSpec, x, dy, filters, channels, taps):
    kernel = jnp.zeros_like(x, shape=(*spec.kernel, spec.cin, spec.cout))
    (gradient,) = jax.vjp(lambda kernel: _convolve(spec, x, kernel), kernel)[1](dy)
    return (
        gradient.reshape(-1, spec.cin, spec.cout)
        .at[_index(filters, channels, taps)]
        .get(mode="promise_in_bounds", unique_indices=True)
    )


IMPLEMENTATION = Implementation(
    "dense", lambda spec: None, _forward, _input_gradient, _weight_gradient
)
