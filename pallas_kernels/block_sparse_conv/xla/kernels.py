"""The three passes in plain XLA, in several formulations; per shape a tuned table picks one
(tiles.py).

All work on one group of filters at a time: gather the rows (channels) of the activations that the
group keeps, multiply by the group's packed weights. Two ways to bring in the taps:

- *rows*: shift on the input side. The operand has `kept * kept_taps` rows. Best when the group
  keeps few channels.
- *taps*: shift on the output side. The operand has `kept_taps * group_size` rows. Best when the
  group keeps many channels.

and three ways to go over the groups: unrolled (compile time grows with the groups), `_loop` (one
compiled body, least memory), `_batched` (one batched product). The last formulation is *dense*, for
layers that keep most.

All passes of a training step use one formulation: they gather the same rows, which XLA finds and
gathers once. Measured, every mixture of formulations loses to the better pure one, also where its
single passes are the faster ones.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_conv import reference as dense
from pallas_kernels.block_sparse_conv.spec import ConvSpec, Implementation
from pallas_kernels.block_sparse_conv.xla import tiles

HINTS = {"mode": "promise_in_bounds", "unique_indices": True}
ROWS = lax.GatherDimensionNumbers(
    offset_dims=(1, 2, 3), collapsed_slice_dims=(0,), start_index_map=(0, 1, 2)
)


def _dot(spec: ConvSpec, a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """Product over one axis of each, accumulated in float32."""
    return lax.dot_general(
        a,
        b,
        (((axis_a,), (axis_b,)), ((), ())),
        precision=spec.precision,
        preferred_element_type=jnp.float32,
    )


def _offsets(spec: ConvSpec, taps: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Offsets `(y, x)` in pixels of the taps in the padded input."""
    return taps // spec.kernel[1] * spec.dilation[0], taps % spec.kernel[1] * spec.dilation[1]


def _gather_rows(
    source: jax.Array, channels: jax.Array, tops: jax.Array, lefts: jax.Array, size: tuple[int, int]
) -> jax.Array:
    """Windows `[rows, *size, n]` of the source `[c, h, w, n]`, one for each (channel, top, left)."""
    starts = jnp.stack([channels, tops, lefts], -1)
    return lax.gather(source, starts, ROWS, (1, *size, source.shape[3]), mode="promise_in_bounds")


def _pad_input(spec: ConvSpec, x: jax.Array) -> jax.Array:
    return lax.pad(
        x, jnp.zeros((), x.dtype), ((0, 0, 0), *((*p, 0) for p in spec.padding), (0, 0, 0))
    )


def _dilate_output(spec: ConvSpec, dy: jax.Array) -> jax.Array:
    """Spreads dy by the strides and pads it, so that the window at `reach - offset` is what a tap
    at `offset` gives to the input.
    """
    edges = [
        (reach - low, reach + size - (reach - low) - (out - 1) * stride - 1, stride - 1)
        for reach, (low, _), size, out, stride in zip(
            spec.reach, spec.padding, spec.in_shape[1:3], spec.out_shape[1:3], spec.strides
        )
    ]
    return lax.pad(dy, jnp.zeros((), dy.dtype), ((0, 0, 0), *edges, (0, 0, 0)))


def _pointwise(spec: ConvSpec) -> ConvSpec | None:
    """The same 1x1 convolution on the pixels that it reads; None where it is no 1x1 convolution or
    reads all.
    """
    plain = dataclasses.replace(
        spec, height=spec.out_height, width=spec.out_width, strides=(1, 1), padding=((0, 0), (0, 0))
    )
    return plain if spec.kernel == (1, 1) and plain != spec else None


def _pixels(spec: ConvSpec, x: jax.Array) -> jax.Array:
    """The pixels that a 1x1 convolution reads; its transpose is `_dilate_output`."""
    span = [(out - 1) * stride + 1 for out, stride in zip(spec.out_shape[1:3], spec.strides)]
    return _pad_input(spec, x)[:, : span[0] : spec.strides[0], : span[1] : spec.strides[1]]


def _input_rows(
    spec: ConvSpec, padded: jax.Array, channels: jax.Array, taps: jax.Array
) -> jax.Array:
    """The rows of the padded input under each (channel, tap): `[kept * kept_taps, ho * wo * n]`."""
    tops, lefts = (jnp.tile(offset, spec.kept) for offset in _offsets(spec, taps))
    span = tuple((out - 1) * stride + 1 for out, stride in zip(spec.out_shape[1:3], spec.strides))
    rows = _gather_rows(padded, jnp.repeat(channels, spec.kept_taps), tops, lefts, span)
    return rows[:, :: spec.strides[0], :: spec.strides[1]].reshape(spec.kept * spec.kept_taps, -1)


def _output_rows(
    spec: ConvSpec, dilated: jax.Array, filters: jax.Array, taps: jax.Array
) -> jax.Array:
    """The rows of the dilated output gradient that reach the input by each (tap, filter):
    `[kept_taps * group_size, h * w * n]`.
    """
    tops, lefts = (
        jnp.repeat(reach - offset, spec.group_size)
        for reach, offset in zip(spec.reach, _offsets(spec, taps))
    )
    rows = _gather_rows(dilated, jnp.tile(filters, spec.kept_taps), tops, lefts, spec.in_shape[1:3])
    return rows.reshape(spec.kept_taps * spec.group_size, -1)


def _take(rows: jax.Array, index: jax.Array) -> jax.Array:
    """The indexed channels, flattened: `[len(index), pixels * n]`."""
    return rows.reshape(rows.shape[0], -1).at[index].get(**HINTS)


# One group's share of each pass: (spec, prepared activations, values, filters, channels, taps) ->
# rows.


def _forward_rows(spec: ConvSpec, padded, values, filters, channels, taps):
    return _dot(
        spec, values.reshape(-1, spec.group_size), _input_rows(spec, padded, channels, taps), 0, 0
    )


def _forward_taps(spec: ConvSpec, x, values, filters, channels, taps):
    z = _dot(spec, values.reshape(spec.kept, -1), _take(x, channels), 0, 0)
    z = z.reshape(spec.kept_taps, spec.group_size, *spec.in_shape[1:])
    tops, lefts = _offsets(spec, taps)
    span = tuple((out - 1) * stride + 1 for out, stride in zip(spec.out_shape[1:3], spec.strides))
    total = 0.0
    for t in range(spec.kept_taps):
        window = lax.dynamic_slice(
            _pad_input(spec, z[t]), (0, tops[t], lefts[t], 0), (spec.group_size, *span, spec.batch)
        )
        total += window[:, :: spec.strides[0], :: spec.strides[1]]
    return total.reshape(spec.group_size, -1)


def _input_gradient_rows(spec: ConvSpec, dy, values, filters, channels, taps):
    rows = _dot(spec, values, _take(dy, filters), 2, 0).reshape(
        spec.kept, spec.kept_taps, *spec.out_shape[1:]
    )
    tops, lefts = _offsets(spec, taps)
    total = 0.0
    for t in range(spec.kept_taps):
        starts = (0, spec.reach[0] - tops[t], spec.reach[1] - lefts[t], 0)
        total += lax.dynamic_slice(
            _dilate_output(spec, rows[:, t]), starts, (spec.kept, *spec.in_shape[1:])
        )
    return total.reshape(spec.kept, -1)


def _input_gradient_taps(spec: ConvSpec, dilated, values, filters, channels, taps):
    return _dot(
        spec, values.reshape(spec.kept, -1), _output_rows(spec, dilated, filters, taps), 1, 0
    )


def _weight_gradient_rows(spec: ConvSpec, padded, dy, filters, channels, taps):
    return _dot(spec, _input_rows(spec, padded, channels, taps), _take(dy, filters), 1, 1).reshape(
        spec.packed_shape[1:]
    )


def _weight_gradient_taps(spec: ConvSpec, x, dilated, filters, channels, taps):
    return _dot(spec, _take(x, channels), _output_rows(spec, dilated, filters, taps), 1, 1).reshape(
        spec.packed_shape[1:]
    )


# Going over the groups.


def _add_rows(total: jax.Array, index: jax.Array, rows: jax.Array) -> jax.Array:
    return total.at[index].add(rows, mode="promise_in_bounds")


def _add_rows_by_gather(total: jax.Array, index: jax.Array, rows: jax.Array) -> jax.Array:
    """As `_add_rows`, but XLA fuses the sums of several groups into one threaded pass."""
    place = (
        jnp.full((total.shape[0],), -1, jnp.int32)
        .at[index]
        .set(jnp.arange(index.shape[0], dtype=jnp.int32), **HINTS)
    )
    return total + jnp.where(
        place[:, None] >= 0, rows.at[jnp.maximum(place, 0)].get(mode="promise_in_bounds"), 0
    )


def _set_rows(total: jax.Array, index: jax.Array, rows: jax.Array) -> jax.Array:
    return total.at[index].set(rows.astype(total.dtype), **HINTS)


def _collect(
    how: str,
    combine: Callable,
    total: jax.Array,
    index: jax.Array,
    share: Callable,
    per_group: Sequence[jax.Array],
) -> jax.Array:
    """Puts every group's rows into `total [rows, pixels * n]` at the group's indices."""
    if how == "batched":
        return combine(
            total, index.reshape(-1), jax.vmap(share)(*per_group).reshape(index.size, -1)
        )

    def step(g: Any, total: jax.Array) -> jax.Array:
        return combine(total, index[g], share(*(a[g] for a in per_group)))

    if how == "loop":
        return lax.fori_loop(0, index.shape[0], step, total)
    for g in range(index.shape[0]):
        total = step(g, total)
    return total


def _zeros(like: jax.Array, rows: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.zeros_like(like, dtype=dtype, shape=(rows, shape[1] * shape[2] * shape[3]))


def _forward(side: str, how: str, spec: ConvSpec, x, values, filters, channels, taps):
    if plain := _pointwise(spec):
        return _forward(side, how, plain, _pixels(spec, x), values, filters, channels, taps)
    source, share = (_pad_input(spec, x), _forward_rows) if side == "rows" else (x, _forward_taps)
    total = _zeros(x, spec.cout, spec.out_shape, x.dtype)
    y = _collect(
        how,
        _set_rows,
        total,
        filters,
        functools.partial(share, spec, source),
        (values, filters, channels, taps),
    )
    return y.reshape(spec.out_shape)


def _input_gradient(side: str, how: str, spec: ConvSpec, dy, values, filters, channels, taps):
    if plain := _pointwise(spec):
        return _dilate_output(
            spec, _input_gradient(side, how, plain, dy, values, filters, channels, taps)
        )
    source, share = (
        (dy, _input_gradient_rows)
        if side == "rows"
        else (_dilate_output(spec, dy), _input_gradient_taps)
    )
    total = _zeros(dy, spec.cin, spec.in_shape, jnp.float32)
    combine = _add_rows_by_gather if how == "unrolled" else _add_rows
    dx = _collect(
        how,
        combine,
        total,
        channels,
        functools.partial(share, spec, source),
        (values, filters, channels, taps),
    )
    return dx.astype(dy.dtype).reshape(spec.in_shape)


def _weight_gradient(side: str, how: str, spec: ConvSpec, x, dy, filters, channels, taps):
    if plain := _pointwise(spec):
        return _weight_gradient(side, how, plain, _pixels(spec, x), dy, filters, channels, taps)
    if side == "rows":
        share = functools.partial(_weight_gradient_rows, spec, _pad_input(spec, x), dy)
    else:
        share = functools.partial(_weight_gradient_taps, spec, x, _dilate_output(spec, dy))
    if how == "batched":
        return jax.vmap(share)(filters, channels, taps)
    if how == "loop":
        return lax.map(lambda index: share(*index), (filters, channels, taps))
    return jnp.stack([share(*index) for index in zip(filters, channels, taps)])


def _formulation(name: str, side: str, how: str) -> Implementation:
    passes = (
        functools.partial(p, side, how) for p in (_forward, _input_gradient, _weight_gradient)
    )
    return Implementation(name, functools.partial(tiles.supports, name), *passes)


FORMULATIONS: dict[str, Implementation] = {
    "rows": _formulation("rows", "rows", "unrolled"),
    "rows_loop": _formulation("rows_loop", "rows", "loop"),
    "rows_batched": _formulation("rows_batched", "rows", "batched"),
    "taps": _formulation("taps", "taps", "unrolled"),
    "taps_loop": _formulation("taps_loop", "taps", "loop"),
    "taps_batched": _formulation("taps_batched", "taps", "batched"),
    "dense": dense.IMPLEMENTATION,
}


def _chosen(name: str, spec: ConvSpec, *operands: jax.Array) -> jax.Array:
    return getattr(FORMULATIONS[tiles.choose(spec)], name)(spec, *operands)


PASSES = ("forward", "input_gradient", "weight_gradient")
IMPLEMENTATION = Implementation(
    "xla", lambda spec: None, *(functools.partial(_chosen, name) for name in PASSES)
)
