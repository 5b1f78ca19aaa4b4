"""The input gradient in the Triton kernels, in each of its ways (`products.METHODS`)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_conv import norm_passes, reference
from pallas_kernels.block_sparse_conv.index import Index
from pallas_kernels.block_sparse_conv.pixels import dilate_output
from pallas_kernels.block_sparse_conv.plan import Plan, list_entries
from pallas_kernels.block_sparse_conv.spec import ConvSpec
from pallas_kernels.block_sparse_conv.triton import calls
from pallas_kernels.block_sparse_conv.triton.fitting import Tile
from pallas_kernels.block_sparse_conv.triton.normal_form import fit, normal, restore
from pallas_kernels.block_sparse_conv.triton.products import METHODS
from pallas_kernels.block_sparse_conv.triton.tiles import choose_norm_tile, choose_tile


def input_gradient(
    spec: ConvSpec,
    dy: jax.Array,
    values: jax.Array,
    index: Index,
    plan: Plan | None = None,
    tile: Tile | None = None,
    method: str = "",
) -> jax.Array:
    """The gradient with respect to x.

    Args:
      spec: the static sizes.
      dy: the gradient with respect to y.
      values: packed weights.
      index: filters, channels and taps.
      plan: the lists of "transposed"; None: made here.
      tile: the tile; None chooses.
      method: one of `products.METHODS`; "" chooses.

    Returns:
      dx `[cin, h, w, n]`.

    Raises:
      ValueError: the tile's method does not run this spec.
    """
    if pointwise := spec.pointwise():
        dpixels = input_gradient(pointwise, dy, values, index, plan, tile=tile, method=method)
        return dilate_output(spec, dpixels)
    tile = tile or choose_tile(spec, "input_gradient", calls.capability(), method)
    plain = normal(spec)
    if tile.method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {tile.method!r}")
    if tile.method == "dense":
        is_ieee = plain.precision == "ieee"
        precision = lax.Precision.HIGHEST if is_ieee else spec.precision
        exact = dataclasses.replace(spec, precision=precision)
        return reference.IMPLEMENTATION.input_gradient(exact, dy, values, *index)
    dy = fit(dy, plain.out_shape)
    if tile.method == "transposed":
        dx = calls.table_product(plain, tile, dy, values, plan or calls.plan_of(plain, index))
    else:
        dx = _scatter(plain, tile, dy, values, index)
    return restore(dx, spec.in_shape)


def norm_input_gradient(
    spec: ConvSpec,
    dy: jax.Array,
    values: jax.Array,
    index: Index,
    norm: calls.ThroughNorm,
    plan: Plan | None = None,
    tile: Tile | None = None,
) -> tuple[jax.Array, ...]:
    """The input gradient that goes on through the norm of the input.

    From the plan's table it is one kernel; in the other ways, and for the pixels that a strided 1x1
    convolution does not read, XLA's operations follow.

    Args:
      spec: the static sizes; `relu`: whether the norm ends in one.
      dy: the gradient with respect to y.
      values: packed weights.
      index: filters, channels and taps.
      norm: of the input.
      plan: the lists of "transposed"; None: made here.
      tile: the tile; None chooses.

    Returns:
      As `Implementation.norm_input_gradient`.
    """
    tile = tile or choose_norm_tile(spec, calls.capability())
    if spec.pointwise() or tile.method != "transposed":

        def plain_pass(spec: ConvSpec, dy: jax.Array, values: jax.Array, *index: Any) -> jax.Array:
            return input_gradient(spec, dy, values, Index(*index), plan, tile)

        arrays: tuple[Any, ...] = (*index, *norm)
        return norm_passes.norm_input_gradient(plain_pass, spec, dy, values, *arrays)
    plain = normal(spec)

    def fitted(activations: jax.Array | None) -> jax.Array | None:
        return None if activations is None else fit(activations, plain.in_shape)

    norm = norm._replace(
        z=fit(norm.z, plain.in_shape), joined=fitted(norm.joined), more=fitted(norm.more)
    )
    plan = plan or calls.plan_of(plain, index)
    dy = fit(dy, plain.out_shape)
    dz, sums, *g = calls.table_product(plain, tile, dy, values, plan, norm, spec.relu)
    return restore(dz, spec.in_shape), sums, *(restore(one, spec.in_shape) for one in g)


def _scatter(
    spec: ConvSpec, tile: Tile, dy: jax.Array, values: jax.Array, index: Index
) -> jax.Array:
    """Each group contracts its filters and taps, and adds the result to float32 sums in memory."""
    depth = spec.kept_taps * spec.group_size
    entries = list_entries(index.filters[:, None, :], index.taps[:, :, None], spec.kernel[1])
    lists = calls.Lists(
        calls.pad_list(entries.reshape(spec.groups, depth)),
        calls.pad_list(index.channels),
        values,
        (spec.kept * depth, 1, depth),
        depth=depth,
        members=spec.kept,
    )
    dx = calls.gather_product(spec, tile, dy, lists, backward=True, dtype=jnp.float32, scatter=True)
    return dx.astype(dy.dtype)
