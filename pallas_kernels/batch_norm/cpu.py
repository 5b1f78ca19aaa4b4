"""Batch norm, a residual and a ReLU in the native CPU kernels: `cpu_kernels/norm_act.h`.

In the handlers' interface an absent array is one without elements.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.batch_norm.spec import NormSpec
from pallas_kernels.block_sparse_conv.cpu import kernels
from pallas_kernels.varying import result_type


def forward(
    spec: NormSpec,
    keeps_signs: bool,
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    residual: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """As `xla.forward`, for x `[channels, ...]` in float32 or bfloat16.

    Args:
      spec: the static arguments.
      keeps_signs: whether the signs of y are written, for the backward pass.
      x, scale, bias, residual: the arrays.

    Returns:
      `(y, mean, variance, signs)`, the signs as bits in uint8 `[channels, bytes]` or None.
    """
    rows = result_type(x, scale.shape, "float32")
    signs_shape = (len(scale), _sign_bytes(x)) if keeps_signs else (0, 0)
    results = (result_type(x, x.shape, x.dtype), rows, rows, result_type(x, signs_shape, "uint8"))
    operands = (x, scale, bias, _or_empty(residual, x))
    *values, signs = _call("norm_act_forward", spec, results, *operands)
    return (*values, signs if keeps_signs else None)


def backward(
    spec: NormSpec,
    dy: jax.Array,
    more: jax.Array | None,
    x: jax.Array,
    signs: jax.Array | None,
    scale: jax.Array,
    *rows: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """As `xla.backward`, with the signs of y in the place of y.

    Args:
      spec: the static arguments.
      dy: of the output.
      more: is added to dy; may be None.
      x: activations.
      signs: as `forward` returns them.
      scale: one number for each channel.
      *rows: the other operands of `xla.backward`.

    Returns:
      `(dx, dscale, dbias, g)`.
    """
    of_rows = result_type(x, scale.shape, "float32")
    like_x = result_type(x, x.shape, x.dtype)
    like_g = result_type(x, (0,) * x.ndim, x.dtype) if signs is None else like_x
    bits = jnp.zeros((0, 0), jnp.uint8) if signs is None else signs
    operands = (dy, _or_empty(more, x), x, bits, scale, *rows)
    results = (like_x, of_rows, of_rows, like_g)
    dx, dscale, dbias, g = _call("norm_act_backward", spec, results, *operands)
    return dx, dscale, dbias, None if signs is None else g


def _sign_bytes(x: jax.Array) -> int:
    """Bytes of a channel's signs: vectors of up to 16 elements write theirs as a whole."""
    return -(-math.prod(x.shape[1:]) // 16) * 2


def _or_empty(array: jax.Array | None, x: jax.Array) -> jax.Array:
    return jnp.zeros((0,) * x.ndim, x.dtype) if array is None else array


def _call(name: str, spec: NormSpec, results: Any, *operands: jax.Array) -> Any:
    call = jax.ffi.ffi_call(kernels.TARGETS[name], results, vmap_method="sequential")
    return call(
        *operands,
        epsilon=np.float32(spec.epsilon),
        relu=spec.relu,
        variant=kernels.forced_variant(),
    )
