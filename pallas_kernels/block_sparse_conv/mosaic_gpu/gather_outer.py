"""The kernel of the weight gradient: rows of dy times rows of x gathered by a list."""

import math
from typing import Any

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
    multiply,
    produce_and_consume,
    source_column,
    source_rows,
    store,
    wait_until_read,
    words,
)
from pallas_kernels.block_sparse_conv.mosaic_gpu.tiles import Tile

INTERPRETER_COPIES_TRANSPOSED = not hasattr(plgpu, "InterpretGPUParams")
"""Whether the interpreter needs transposed operands in memory: that of jax 0.10 multiplies no
transposed references."""


def gather_outer(
    gather: Gather,
    tile: Tile,
    lists: jax.Array,
    source: jax.Array,
    grouped: jax.Array,
    group: int,
    *,
    interpret: Any = None,
) -> jax.Array:
    """Partial sums of `grouped[g] @ gathered source rows^T`, one for each share of the pixels.

    Args:
      gather: which pixels a forward pass reads and writes.
      tile: tile sizes; `tile.depth == tile.images`.
      lists: int32 `[groups, n]`, entries (see `geometry.entry`), `n * gather.run` a multiple of
        `tile.columns`.
      source: `[channels, pixels * images]`.
      grouped: `[groups * group, output pixels * images]`, the rows of a group together.
      group: rows of a group, a multiple of 8 and at most `tile.rows`.
      interpret: None, or the parameters of Pallas' interpreter.

    Returns:
      float32 `[splits, groups, tile.rows, n * gather.run]`; rows from `group` on are undefined.
    """
    dtype, groups = source.dtype, lists.shape[0]
    entries = tile.columns // gather.run
    width = tile.columns // tile.consumers  # of a warpgroup
    parts = lists.shape[1] // entries
    image_tiles = gather.images // tile.images
    steps = math.prod(gather.output) * image_tiles
    steps_of_split = -(-steps // tile.splits)

    def body(lists, source, grouped, out, y_ring, x_ring, full, empty, *transposed):
        number, g = divide(lax.axis_index("block"), groups)
        split, part = divide(number, parts)
        count = jnp.maximum(jnp.minimum(steps_of_split, steps - split * steps_of_split), 0)

        def produce():
            @pl.loop(0, count)
            def _(k):
                slot = lax.rem(k, tile.stages)
                pixel, image = divide(split * steps_of_split + k, image_tiles)
                y, x = divide(pixel, gather.output[1])
                corner = (y * gather.read_stride[0], x * gather.read_stride[1])

                @pl.when(k >= tile.stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                column = pl.multiple_of(pixel * gather.images + image * tile.images, 64)
                group_rows = pl.ds(pl.multiple_of(g * group, 8), group)
                plgpu.copy_gmem_to_smem(
                    grouped.at[group_rows, pl.ds(column, tile.images)],
                    y_ring.at[slot, pl.ds(0, group)],
                    full.at[slot],
                )
                for e, word in words(lists, g, part * entries, entries):
                    column = source_column(gather, word, corner, image * tile.images)
                    columns = pl.ds(column, tile.images)
                    plgpu.copy_gmem_to_smem(
                        source.at[source_rows(gather, word), columns],
                        x_ring.at[slot, pl.ds(e * gather.run, gather.run)],
                        full.at[slot],
                    )

            wait_until_read(tile, count, empty)

        def consume(warpgroup):
            warpgroup_columns = pl.ds(pl.multiple_of(warpgroup * width, 64), width)

            def operands(slot):
                if not transposed:
                    return y_ring.at[slot], x_ring.at[slot, warpgroup_columns].transpose((1, 0))
                transposed[0][warpgroup] = x_ring[slot, warpgroup_columns].T
                return y_ring.at[slot], transposed[0].at[warpgroup]

            shape = (tile.rows, width)
            product = multiply(tile, shape, count, jnp.int32(0), full, empty, operands)
            column = pl.multiple_of(part * tile.columns + warpgroup * width, 64)
            store(out.at[split, g, :, pl.ds(column, width)], product, interpret)

        produce_and_consume(tile, produce, consume)

    scratch = [
        plgpu.SMEM((tile.stages, tile.rows, tile.depth), dtype, transforms=SWIZZLED),
        plgpu.SMEM((tile.stages, tile.columns, tile.depth), dtype, transforms=SWIZZLED),
        plgpu.Barrier(num_barriers=tile.stages, num_arrivals=1 + entries),
        plgpu.Barrier(num_barriers=tile.stages, num_arrivals=tile.consumers),
    ]
    if interpret is not None and INTERPRETER_COPIES_TRANSPOSED:
        scratch.append(plgpu.SMEM((tile.consumers, tile.depth, width), dtype))
    out_shape = (tile.splits, groups, tile.rows, parts * tile.columns)
    out_type = jax.ShapeDtypeStruct(out_shape, jnp.float32)
    kernel = launch(body, groups * parts * tile.splits, tile, out_type, scratch, interpret)
    return kernel(lists, source, grouped)
