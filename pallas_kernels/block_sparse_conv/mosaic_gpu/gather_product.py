"""The kernel of the forward pass and the input gradient: weights times rows gathered by a list.

It is persistent: each thread block takes tile after tile, and copies for the next tile run during
the end of the last one. The blocks of output rows (groups) vary fastest over the tiles: what reads
the same pixels runs at the same time and meets in the L2 cache.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse_conv.mosaic_gpu.geometry import Gather
from pallas_kernels.block_sparse_conv.mosaic_gpu.pipeline import (
    SWIZZLED,
    divide,
    launch,
    load,
    multiply,
    produce_and_consume,
    source_column,
    source_rows,
    store,
    wait_until_read,
    words,
)
from pallas_kernels.block_sparse_conv.mosaic_gpu.tiles import Tile
from pallas_kernels.devices import this_device

OUTSIDE = 1 << 20
"""Added to a pixel's coordinate, it puts all its taps outside the image."""


class _Place(NamedTuple):
    """Which part of the result a tile is.

    Attributes:
      block: of output rows.
      phase: of the output pixels.
      image: the first image.
      pixel: the first pixel of the phase.
    """

    block: jax.Array
    phase: jax.Array
    image: jax.Array
    pixel: jax.Array


def gather_product(
    gather: Gather,
    tile: Tile,
    counts: jax.Array,
    lists: jax.Array,
    weights: jax.Array,
    source: jax.Array,
    out_rows: jax.Array | None,
    out_channels: int,
    *,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    relu: bool = False,
    interpret: Any = None,
    processors: int | None = None,
) -> jax.Array:
    """Multiplies weights with gathered rows, for each block of output rows and each phase.

    For each block b, `out[out_rows[b]] = act(scale[b] * (weights[b] @ gathered rows) + bias[b] +
    residual)`.

    Args:
      gather: which pixels are read and written.
      tile: tile sizes; `tile.images` divides `gather.images`. With several pixels in a tile
        `gather.run` is 8.
      counts: int32 `[phases * blocks]`, stages of `tile.depth` gathered rows that each list fills.
      lists: int32 `[phases * blocks, n]`, entries (see `geometry.entry`); an entry past the end of
        the source gives zeros.
      weights: `[phases * blocks, tile.rows, n * gather.run]`.
      source: `[channels, pixels * images]`.
      out_rows: int32 `[blocks, g]`, the output rows of each block, g at most `tile.rows`; None:
        block b has the `tile.rows` rows from `b * tile.rows` on, as far as there are.
      out_channels: rows of the output; without `out_rows` a multiple of 8.
      scale, bias: float32 `[blocks, tile.rows]`.
      residual: `[out_channels, pixels * images]`; only with `out_rows`.
      relu: whether `act` is `max(., 0)`.
      interpret: None, or the parameters of Pallas' interpreter.
      processors: thread blocks at a time; None: the GPU's multiprocessors.

    Returns:
      `[out_channels, pixels * images]` in the source's dtype.
    """
    dtype, blocks = source.dtype, weights.shape[0] // gather.phases
    rows_of_block = 1 if out_rows is None else out_rows.shape[1]
    lines = math.gcd(tile.rows, out_channels)  # rows that are stored together, without out_rows
    width = tile.columns // tile.consumers  # of a warpgroup
    piece = min(tile.images, width)  # columns that lie together in memory
    # Rows that are stored one by one are 16 bytes longer, so that threads do not meet in a bank; a
    # residual's copies into them forbid it.
    pitch = piece + 8 if out_rows is not None and residual is None else piece
    pieces = width // piece
    pixels_of_tile = tile.columns // tile.images
    entries = tile.depth // gather.run
    image_tiles = gather.images // tile.images
    pixels_of_phase = math.prod(gather.phase_size)
    pixel_tiles = -(-pixels_of_phase // pixels_of_tile)
    tiles = image_tiles * pixel_tiles * gather.phases * blocks
    launched = min(processors or this_device().multiprocessors, tiles)
    optional = {"out_rows": out_rows, "scale": scale, "bias": bias, "residual": residual}
    optional = {name: array for name, array in optional.items() if array is not None}

    def locate(number):
        number, block = divide(number, blocks)
        number, phase = divide(number, gather.phases)
        number, image = divide(number, image_tiles)
        return _Place(block, phase, image * tile.images, number * pixels_of_tile)

    def body(counts, lists, weights, source, *others):
        optional_refs = dict(zip(optional, others, strict=False))
        out, w_ring, x_ring, staged, full, empty, ready = others[len(optional) :]
        out_rows_ref = optional_refs.get("out_rows")
        residual_ref = optional_refs.get("residual")
        first = lax.axis_index("block")
        tile_count = lax.div(tiles - first + launched - 1, launched)

        def fetch_tile(i, done):
            place = locate(first + i * launched)
            list_index = place.phase * blocks + place.block
            corners = []
            for t in range(pixels_of_tile):
                y, x = divide(place.pixel + t, gather.phase_size[1])
                outside = jnp.where(place.pixel + t < pixels_of_phase, 0, OUTSIDE)
                corners.append((y * gather.read_stride[0] + outside, x * gather.read_stride[1]))
            count = counts[list_index]

            @pl.loop(0, count)
            def _(k):
                slot = lax.rem(done + k, tile.stages)

                @pl.when(done + k >= tile.stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                plgpu.copy_gmem_to_smem(
                    weights.at[list_index, :, pl.ds(k * tile.depth, tile.depth)],
                    w_ring.at[slot],
                    full.at[slot],
                )
                for e, word in words(lists, list_index, k * entries, entries):
                    for t, corner in enumerate(corners):
                        column = source_column(gather, word, corner, place.image)
                        plgpu.copy_gmem_to_smem(
                            source.at[source_rows(gather, word), pl.ds(column, tile.images)],
                            x_ring.at[
                                slot,
                                pl.ds(e * gather.run, gather.run),
                                pl.ds(t * tile.images, tile.images),
                            ],
                            full.at[slot],
                        )

            return done + count

        def each_piece(warpgroup, place, use):
            """Calls `use` for each piece of columns that lie together.

            `use` takes whether the piece exists, its first column in the output, and its index in
            the staging memory.
            """
            height, row_length = gather.output
            for p in range(pieces):
                t, offset = divide(warpgroup * width + p * piece, tile.images)
                y, x = divide(place.pixel + t, gather.phase_size[1])
                phase_y, phase_x = divide(place.phase, gather.write_stride[1])
                y = y * gather.write_stride[0] + phase_y
                x = x * gather.write_stride[1] + phase_x
                exists = (place.pixel + t < pixels_of_phase) & (y < height) & (x < row_length)
                column = (y * row_length + x) * gather.images + place.image + offset
                use(exists, column, warpgroup * pieces + p)

        def fetch_residual(warpgroup, place):
            def fetch_piece(exists, column, index):
                beyond_the_output = math.prod(gather.output) * gather.images
                column = jnp.where(exists, column, beyond_the_output)

                @pl.loop(0, rows_of_block)
                def _(r):
                    columns = pl.ds(pl.multiple_of(column, 64), piece)
                    plgpu.copy_gmem_to_smem(
                        residual_ref.at[out_rows_ref[place.block, r], columns],
                        staged.at[index, r],
                        ready.at[warpgroup],
                    )

            each_piece(warpgroup, place, fetch_piece)

        def store_result(warpgroup, place):
            def store_piece(exists, column, index):
                columns = pl.ds(pl.multiple_of(column, 64), piece)

                @pl.when(exists)
                def _():
                    if out_rows_ref is None:
                        store_lines(place.block, columns, index)
                    else:
                        store_listed_rows(place.block, columns, index)

            each_piece(warpgroup, place, store_piece)

        def store_listed_rows(block, columns, index):
            """Each row to where `out_rows` says."""

            @pl.loop(0, rows_of_block)
            def _(r):
                row = staged.at[index, r]
                if pitch != piece:
                    row = staged.at[index, r, pl.ds(0, piece)]
                to = out.at[out_rows_ref[block, r], columns]
                plgpu.copy_smem_to_gmem(row, to, commit_group=False)

        def store_lines(block, columns, index):
            """The rows of the block, several at a time, as far as the output has them."""
            for line in range(0, tile.rows, lines):
                row = pl.multiple_of(block * tile.rows + line, lines)

                @pl.when(row < out_channels)
                def _(line=line, row=row):
                    plgpu.copy_smem_to_gmem(
                        staged.at[index, pl.ds(line, lines)],
                        out.at[pl.ds(row, lines), columns],
                        commit_group=False,
                    )

        def finish_tile(warpgroup, i, done):
            place = locate(first + i * launched)
            count = counts[place.phase * blocks + place.block]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the staging memory is free again
            if residual_ref is not None:
                fetch_residual(warpgroup, place)
            warpgroup_columns = pl.ds(pl.multiple_of(warpgroup * width, 64), width)

            def operands(slot):
                return w_ring.at[slot], x_ring.at[slot, :, warpgroup_columns]

            product = multiply(tile, (tile.rows, width), count, done, full, empty, operands)
            for name, apply in (("scale", jnp.multiply), ("bias", jnp.add)):
                if name in optional_refs:
                    ref = optional_refs[name].at[place.block]
                    vector = load(ref, plgpu.Layout.WGMMA.reduce(1), interpret)
                    product = apply(product, lax.broadcast_in_dim(vector, product.shape, (0,)))
            if residual_ref is not None:
                plgpu.barrier_wait(ready.at[warpgroup])
            for p in range(pieces):
                y = product[:, p * piece : (p + 1) * piece]
                index = warpgroup * pieces + p
                ref = staged.at[index]
                if pitch != piece:
                    ref = staged.at[index, :, pl.ds(0, piece)]
                if residual_ref is not None:
                    y += load(ref, plgpu.Layout.WGMMA, interpret).astype(jnp.float32)
                store(ref, (jnp.maximum(y, 0) if relu else y).astype(dtype), interpret)
            plgpu.commit_smem()
            store_result(warpgroup, place)
            plgpu.commit_smem_to_gmem_group()
            return done + count

        def produce():
            fetched = lax.fori_loop(0, tile_count, fetch_tile, jnp.int32(0))
            wait_until_read(tile, fetched, empty)

        def consume(warpgroup):
            finish = functools.partial(finish_tile, warpgroup)
            lax.fori_loop(0, tile_count, finish, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        produce_and_consume(tile, produce, consume)

    scratch = [
        plgpu.SMEM((tile.stages, tile.rows, tile.depth), dtype, transforms=SWIZZLED),
        plgpu.SMEM((tile.stages, tile.depth, tile.columns), dtype, transforms=SWIZZLED),
        plgpu.SMEM(
            (tile.columns // piece, tile.rows, pitch),
            dtype,
            transforms=SWIZZLED if out_rows is None else (),
        ),
        plgpu.Barrier(num_barriers=tile.stages, num_arrivals=1 + entries * pixels_of_tile),
        plgpu.Barrier(num_barriers=tile.stages, num_arrivals=tile.consumers),
        plgpu.Barrier(num_barriers=tile.consumers, num_arrivals=rows_of_block * pieces),
    ]
    out_type = jax.ShapeDtypeStruct((out_channels, math.prod(gather.output) * gather.images), dtype)
    kernel = launch(body, launched, tile, out_type, scratch, interpret)
    return kernel(counts, lists, weights, source, *optional.values())
