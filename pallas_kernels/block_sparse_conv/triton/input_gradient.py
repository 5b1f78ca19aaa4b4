"""The input gradient in the Triton kernels, in each of its ways (`products.METHODS`)."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_conv import reference
from pallas_kernels.block_sparse_conv.index import Index
from pallas_kernels.block_sparse_conv.pixels import dilate_output
from pallas_kernels.block_sparse_conv.spec import ConvSpec
from pallas_kernels.block_sparse_conv.triton import calls
from pallas_kernels.block_sparse_conv.triton.fitting import Tile
from pallas_kernels.block_sparse_conv.triton.normal_form import fit, normal, restore
from pallas_kernels.block_sparse_conv.triton.products import methods
from pallas_kernels.block_sparse_conv.triton.tiles import choose_tile
from pallas_kernels.padding import round_up


def input_gradient(
    spec: ConvSpec,
    dy: jax.Array,
    values: jax.Array,
    index: Index,
    tile: Tile | None = None,
    method: str = "",
) -> jax.Array:
    """The gradient with respect to x.

    Args:
      spec: the static sizes.
      dy: the gradient with respect to y.
      values: packed weights.
      index: filters, channels and taps.
      tile: the tile; None chooses.
      method: one of `products.METHODS`; "" chooses.

    Returns:
      dx `[cin, h, w, n]`.

    Raises:
      ValueError: the tile's method does not run this spec.
    """
    if pointwise := spec.pointwise():
        dpixels = input_gradient(pointwise, dy, values, index, tile=tile, method=method)
        return dilate_output(spec, dpixels)
    tile = tile or choose_tile(spec, "input_gradient", calls.capability(), method)
    plain = normal(spec)
    if tile.method not in methods(spec):
        raise ValueError(
            f"method: expected one of {', '.join(methods(spec))} for "
            f"channel_block={spec.channel_block}, got {tile.method!r}"
        )
    if tile.method == "dense":
        is_ieee = plain.precision == "ieee"
        precision = lax.Precision.HIGHEST if is_ieee else spec.precision
        exact = dataclasses.replace(spec, precision=precision)
        return reference.IMPLEMENTATION.input_gradient(exact, dy, values, *index)
    run = _transposed if tile.method == "transposed" else _scatter
    return restore(run(plain, tile, fit(dy, plain.out_shape), values, index), spec.in_shape)


def _scatter(
    spec: ConvSpec, tile: Tile, dy: jax.Array, values: jax.Array, index: Index
) -> jax.Array:
    """Each group contracts its filters and taps, and adds the result to float32 sums in memory."""
    depth = spec.kept_taps * spec.group_size
    lists = calls.entries(
        spec, index.filters, index.taps, taps_first=True, depth=round_up(depth, tile.depth)
    )
    weights = calls.Weights(values, (spec.kept * depth, 1, depth), depth=depth, members=spec.kept)
    dx = calls.gather_product(
        spec,
        tile,
        dy,
        lists,
        weights,
        index.channels,
        backward=True,
        dtype=jnp.float32,
        scatter=True,
    )
    return dx.astype(dy.dtype)


def _transposed(
    spec: ConvSpec, tile: Tile, dy: jax.Array, values: jax.Array, index: Index
) -> jax.Array:
    """Each run of channels contracts the filters and taps of all groups that keep it.

    A table lists them, so nothing is added in memory.
    """
    run, depth = spec.channel_block, spec.kept_taps * spec.group_size
    padded_depth = round_up(depth, tile.depth)
    runs, kept_runs = spec.cin // run, spec.kept // run
    run_of_pair = index.channels[:, ::run].reshape(-1) // run  # of each (group, kept run)
    order = jnp.argsort(run_of_pair)
    first_pair = jnp.searchsorted(run_of_pair[order], jnp.arange(runs + 1), method="compare_all")
    bounds = first_pair.astype(jnp.int32) * padded_depth
    lists = calls.entries(spec, index.filters, index.taps, taps_first=True, depth=padded_depth)
    table = lists[order // kept_runs].reshape(-1)
    table = calls.pad_last(table, table.size + tile.depth)  # the kernel reads one step ahead
    packed = values.reshape(spec.groups, kept_runs, run, depth).swapaxes(2, 3)
    packed = packed.reshape(-1, depth, run)[order]
    packed = jnp.pad(packed, ((0, 0), (0, padded_depth - depth), (0, 0)))
    return calls.gather_product(
        spec,
        tile,
        dy,
        table,
        calls.Weights(packed, (0, run, 1), depth=depth, members=run),
        jnp.arange(spec.cin, dtype=jnp.int32).reshape(runs, run),
        backward=True,
        dtype=dy.dtype,
        bounds=bounds,
    )
