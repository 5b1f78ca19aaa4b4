"""One group's share of each pass, in two ways to bring in the taps.

Every function takes `(spec, activations, ..., filters, channels, taps)` of one group, the
activations padded (`pixels.pad_input`) or dilated (`pixels.dilate_output`) where their name says
so, and returns that group's rows of the result.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_conv.pixels import dilate_output, pad_input, window_size
from pallas_kernels.block_sparse_conv.spec import ConvSpec, Pair

WINDOWS = lax.GatherDimensionNumbers(
    offset_dims=(1, 2, 3), collapsed_slice_dims=(0,), start_index_map=(0, 1, 2)
)


def forward_rows(
    spec: ConvSpec,
    padded: jax.Array,
    values: jax.Array,
    filters: jax.Array,
    channels: jax.Array,
    taps: jax.Array,
) -> jax.Array:
    """The group's output `[group_size, ho * wo * n]`: one product with the shifted input rows."""
    rows = _input_rows(spec, padded, channels, taps)
    return _dot(spec, values.reshape(-1, spec.group_size), rows, 0, 0)


def forward_taps(
    spec: ConvSpec,
    x: jax.Array,
    values: jax.Array,
    filters: jax.Array,
    channels: jax.Array,
    taps: jax.Array,
) -> jax.Array:
    """The group's output `[group_size, ho * wo * n]`: one product, whose results are shifted."""
    product = _dot(spec, values.reshape(spec.kept, -1), _take(x, channels), 0, 0)
    product = product.reshape(spec.kept_taps, spec.group_size, *spec.in_shape[1:])
    tops, lefts = _offsets(spec, taps)
    height, width = window_size(spec)
    total = jnp.float32(0)
    for t in range(spec.kept_taps):
        sizes = (spec.group_size, height, width, spec.batch)
        window = _window(pad_input(spec, product[t]), tops[t], lefts[t], sizes)
        total += window[:, :: spec.strides[0], :: spec.strides[1]]
    return total.reshape(spec.group_size, -1)


def input_gradient_rows(
    spec: ConvSpec,
    dy: jax.Array,
    values: jax.Array,
    filters: jax.Array,
    channels: jax.Array,
    taps: jax.Array,
) -> jax.Array:
    """The gradient of the group's input `[kept, h * w * n]`: one product, its results shifted."""
    product = _dot(spec, values, _take(dy, filters), 2, 0)
    product = product.reshape(spec.kept, spec.kept_taps, *spec.out_shape[1:])
    tops, lefts = _offsets(spec, taps)
    total = jnp.float32(0)
    for t in range(spec.kept_taps):
        top, left = spec.reach[0] - tops[t], spec.reach[1] - lefts[t]
        sizes = (spec.kept, *spec.in_shape[1:])
        total += _window(dilate_output(spec, product[:, t]), top, left, sizes)
    return total.reshape(spec.kept, -1)


def input_gradient_taps(
    spec: ConvSpec,
    dilated: jax.Array,
    values: jax.Array,
    filters: jax.Array,
    channels: jax.Array,
    taps: jax.Array,
) -> jax.Array:
    """The gradient of the group's input `[kept, h * w * n]`: a product with shifted rows of dy."""
    rows = _output_rows(spec, dilated, filters, taps)
    return _dot(spec, values.reshape(spec.kept, -1), rows, 1, 0)


def weight_gradient_rows(
    spec: ConvSpec,
    padded: jax.Array,
    dy: jax.Array,
    filters: jax.Array,
    channels: jax.Array,
    taps: jax.Array,
) -> jax.Array:
    """The gradient of the group's values `[kept, kept_taps, group_size]`: shifted rows of x."""
    rows = _input_rows(spec, padded, channels, taps)
    return _dot(spec, rows, _take(dy, filters), 1, 1).reshape(spec.packed_shape[1:])


def weight_gradient_taps(
    spec: ConvSpec,
    x: jax.Array,
    dilated: jax.Array,
    filters: jax.Array,
    channels: jax.Array,
    taps: jax.Array,
) -> jax.Array:
    """The gradient of the group's values `[kept, kept_taps, group_size]`: shifted rows of dy."""
    rows = _output_rows(spec, dilated, filters, taps)
    return _dot(spec, _take(x, channels), rows, 1, 1).reshape(spec.packed_shape[1:])


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


def _take(activations: jax.Array, index: jax.Array) -> jax.Array:
    """The indexed channels as rows `[len(index), pixels * n]`."""
    rows = activations.reshape(activations.shape[0], -1)
    return rows.at[index].get(mode="promise_in_bounds", unique_indices=True)


def _window(
    source: jax.Array, top: jax.Array, left: jax.Array, sizes: tuple[int, ...]
) -> jax.Array:
    """All channels and images of `[c, h, w, n]` in one window."""
    zero = jnp.int32(0)  # as the offsets are: a plain 0 is an int64 under jax_enable_x64
    return lax.dynamic_slice(source, (zero, top, left, zero), sizes)


def _windows(
    source: jax.Array, channels: jax.Array, tops: jax.Array, lefts: jax.Array, size: Pair
) -> jax.Array:
    """Windows `[rows, *size, n]` of `[c, h, w, n]`, one for each (channel, top, left)."""
    starts = jnp.stack([channels, tops, lefts], -1)
    return lax.gather(
        source, starts, WINDOWS, (1, *size, source.shape[3]), mode="promise_in_bounds"
    )


def _input_rows(
    spec: ConvSpec, padded: jax.Array, channels: jax.Array, taps: jax.Array
) -> jax.Array:
    """The rows of the padded input under each (channel, tap): `[kept * kept_taps, ho * wo * n]`."""
    tops, lefts = (jnp.tile(offset, spec.kept) for offset in _offsets(spec, taps))
    repeated = jnp.repeat(channels, spec.kept_taps)
    rows = _windows(padded, repeated, tops, lefts, window_size(spec))
    return rows[:, :: spec.strides[0], :: spec.strides[1]].reshape(spec.kept * spec.kept_taps, -1)


def _output_rows(
    spec: ConvSpec, dilated: jax.Array, filters: jax.Array, taps: jax.Array
) -> jax.Array:
    """The rows of the dilated dy that reach the input through each (tap, filter).

    Their shape is `[kept_taps * group_size, h * w * n]`.
    """
    tops, lefts = (
        jnp.repeat(reach - offset, spec.group_size)
        for reach, offset in zip(spec.reach, _offsets(spec, taps), strict=True)
    )
    rows = _windows(dilated, jnp.tile(filters, spec.kept_taps), tops, lefts, spec.in_size)
    return rows.reshape(spec.kept_taps * spec.group_size, -1)
