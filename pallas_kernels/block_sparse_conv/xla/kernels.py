"""The formulations of the three passes in plain XLA; `tiles.py` picks one for each shape.

All work on one group of filters at a time: gather the rows (channels) of the activations that the
group keeps, and multiply by the group's packed weights. There are two ways to bring in the taps:

- *rows*: shift on the input side. The operand has `kept * kept_taps` rows: best when the group
  keeps few channels.
- *taps*: shift on the output side. The operand has `kept_taps * group_size` rows: best when the
  group keeps many channels.

And there are three ways to go over the groups: unrolled (compile time grows with the groups),
`_loop` (one compiled body, least memory) and `_batched` (one batched product). The last formulation
is *dense*, for layers that keep most of their weights.

All passes of a training step use one formulation: they gather the same rows, which XLA then gathers
once. Every mixture of formulations that was measured loses to the better pure one, also where its
passes are the faster ones by themselves.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_conv import reference
from pallas_kernels.block_sparse_conv.pixels import dilate_output, pad_input, read_pixels
from pallas_kernels.block_sparse_conv.spec import ConvSpec, Implementation
from pallas_kernels.block_sparse_conv.xla import group_passes, tiles

UNIQUE: dict[str, Any] = {"mode": "promise_in_bounds", "unique_indices": True}


def _forward(
    side: str,
    loop: str,
    spec: ConvSpec,
    x: jax.Array,
    values: jax.Array,
    filters: jax.Array,
    channels: jax.Array,
    taps: jax.Array,
) -> jax.Array:
    if pointwise := spec.pointwise():
        pixels = read_pixels(spec, x)
        return _forward(side, loop, pointwise, pixels, values, filters, channels, taps)
    if side == "rows":
        share = functools.partial(group_passes.forward_rows, spec, pad_input(spec, x))
    else:
        share = functools.partial(group_passes.forward_taps, spec, x)
    total = _zero_rows(x, spec.cout, spec.out_shape, x.dtype)
    y = _collect(loop, _set_rows, total, filters, share, (values, filters, channels, taps))
    return y.reshape(spec.out_shape)


def _input_gradient(
    side: str,
    loop: str,
    spec: ConvSpec,
    dy: jax.Array,
    values: jax.Array,
    filters: jax.Array,
    channels: jax.Array,
    taps: jax.Array,
) -> jax.Array:
    if pointwise := spec.pointwise():
        dpixels = _input_gradient(side, loop, pointwise, dy, values, filters, channels, taps)
        return dilate_output(spec, dpixels)
    if side == "rows":
        share = functools.partial(group_passes.input_gradient_rows, spec, dy)
    else:
        share = functools.partial(group_passes.input_gradient_taps, spec, dilate_output(spec, dy))
    total = _zero_rows(dy, spec.cin, spec.in_shape, jnp.float32)
    add = _add_rows_by_gather if loop == "unrolled" else _add_rows
    dx = _collect(loop, add, total, channels, share, (values, filters, channels, taps))
    return dx.astype(dy.dtype).reshape(spec.in_shape)


def _weight_gradient(
    side: str,
    loop: str,
    spec: ConvSpec,
    x: jax.Array,
    dy: jax.Array,
    filters: jax.Array,
    channels: jax.Array,
    taps: jax.Array,
) -> jax.Array:
    if pointwise := spec.pointwise():
        pixels = read_pixels(spec, x)
        return _weight_gradient(side, loop, pointwise, pixels, dy, filters, channels, taps)
    if side == "rows":
        share = functools.partial(group_passes.weight_gradient_rows, spec, pad_input(spec, x), dy)
    else:
        dilated = dilate_output(spec, dy)
        share = functools.partial(group_passes.weight_gradient_taps, spec, x, dilated)
    if loop == "batched":
        return jax.vmap(share)(filters, channels, taps)
    if loop == "loop":
        return lax.map(lambda index: share(*index), (filters, channels, taps))
    return jnp.stack([share(*index) for index in zip(filters, channels, taps, strict=True)])


def _collect(
    loop: str,
    combine: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    total: jax.Array,
    index: jax.Array,
    share: Callable[..., jax.Array],
    per_group: Sequence[jax.Array],
) -> jax.Array:
    """Combines every group's rows with those of `total [rows, pixels * n]` at the group's index."""
    if loop == "batched":
        rows = jax.vmap(share)(*per_group).reshape(index.size, -1)
        return combine(total, index.reshape(-1), rows)

    def add_group(g: Any, total: jax.Array) -> jax.Array:
        return combine(total, index[g], share(*(a[g] for a in per_group)))

    if loop == "loop":
        return lax.fori_loop(0, index.shape[0], add_group, total)
    for g in range(index.shape[0]):
        total = add_group(g, total)
    return total


def _set_rows(total: jax.Array, index: jax.Array, rows: jax.Array) -> jax.Array:
    return total.at[index].set(rows.astype(total.dtype), **UNIQUE)


def _add_rows(total: jax.Array, index: jax.Array, rows: jax.Array) -> jax.Array:
    return total.at[index].add(rows, mode="promise_in_bounds")


def _add_rows_by_gather(total: jax.Array, index: jax.Array, rows: jax.Array) -> jax.Array:
    """As `_add_rows`, but XLA fuses the sums of several groups into one threaded pass."""
    nowhere = jnp.full((total.shape[0],), -1, jnp.int32)
    place = nowhere.at[index].set(jnp.arange(index.shape[0], dtype=jnp.int32), **UNIQUE)
    gathered = rows.at[jnp.maximum(place, 0)].get(mode="promise_in_bounds")
    return total + jnp.where(place[:, None] >= 0, gathered, 0)


def _zero_rows(like: jax.Array, rows: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.zeros_like(like, dtype=dtype, shape=(rows, shape[1] * shape[2] * shape[3]))


def _formulation(name: str, side: str, loop: str) -> Implementation:
    return Implementation(
        name,
        supports=functools.partial(tiles.supports, name),
        forward=functools.partial(_forward, side, loop),
        input_gradient=functools.partial(_input_gradient, side, loop),
        weight_gradient=functools.partial(_weight_gradient, side, loop),
    )


FORMULATIONS: dict[str, Implementation] = {
    "rows": _formulation("rows", "rows", "unrolled"),
    "rows_loop": _formulation("rows_loop", "rows", "loop"),
    "rows_batched": _formulation("rows_batched", "rows", "batched"),
    "taps": _formulation("taps", "taps", "unrolled"),
    "taps_loop": _formulation("taps_loop", "taps", "loop"),
    "taps_batched": _formulation("taps_batched", "taps", "batched"),
    "dense": reference.IMPLEMENTATION,
}
