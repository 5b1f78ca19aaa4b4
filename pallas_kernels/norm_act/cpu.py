"""Batch norm, a residual and a ReLU in the native CPU kernels: `cpu_kernels/norm_act.h`.

In the handlers' interface an absent array is one without elements.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse_conv.cpu import kernels
from pallas_kernels.norm_act.spec import NormSpec
from pallas_kernels.varying import result_type


def forward(
    spec: NormSpec,
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    residual: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `xla.forward`, for x `[channels, ...]` in float32 or bfloat16."""
    rows = result_type(x, scale.shape, "float32")
    results = (result_type(x, x.shape, x.dtype), rows, rows)
    return _call("norm_act_forward", spec, results, x, scale, bias, _or_empty(residual, x))


def backward(
    spec: NormSpec,
    dy: jax.Array,
    x: jax.Array,
    y: jax.Array | None,
    scale: jax.Array,
    *rows: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """As `xla.backward`."""
    of_rows = result_type(x, scale.shape, "float32")
    like_x = result_type(x, x.shape, x.dtype)
    like_y = like_x if y is not None else result_type(x, (0,) * x.ndim, x.dtype)
    dx, dscale, dbias, g = _call(
        "norm_act_backward",
        spec,
        (like_x, of_rows, of_rows, like_y),
        dy,
        x,
        _or_empty(y, x),
        scale,
        *rows,
    )
    return dx, dscale, dbias, None if y is None else g


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
