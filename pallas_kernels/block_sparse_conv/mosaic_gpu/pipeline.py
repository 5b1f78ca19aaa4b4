"""What both Mosaic GPU kernels share: copies by a list, the ring of stages, and the products.

An entry of a list names a run of source rows and an offset in pixels. The copy engine (TMA) brings
the run, shifted, into swizzled shared memory as a piece of a matrix operand. A shifted pixel
outside the image is asked for beyond the end of the matrix, where the copy engine fills in zeros:
padding costs neither a copy nor memory traffic. One warpgroup copies ahead through a ring of
stages, the others multiply (wgmma) into float32 registers.

Pallas would put a barrier of the 128 threads of a warpgroup before every copy and around every
store. `launch` turns that off, and order comes from the barriers that are written in the kernels
(all waits and arrivals are those of 128 threads):

- The ring: a copy into a stage follows the copying thread's own wait on `empty`, where every
  multiplying thread arrives after its share of the products is done. A fast warp cannot pass a slow
  one by a round: the next phase of `full` and `empty` needs the slow one's arrivals.
- The staging memory: `wait_smem_to_gmem` (the thread that stores waits until its bulk stores have
  read it; then a barrier) comes before anything is written there, `commit_smem` (a fence to the
  copy engine; then a barrier) between the writes and the next stores.
- A residual lies in the staging memory before the result does. Its reads and the writes that follow
  have the same layout (the layout of the sums, without an exchange between threads), so each thread
  overwrites only what it has read itself.
- Nothing else is both read and written: lists, counts, weights and the vectors of the epilogue are
  only read, the result is only written.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse_conv.mosaic_gpu.geometry import Gather
from pallas_kernels.block_sparse_conv.mosaic_gpu.tiles import Tile

SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def load(ref: Any, layout: Any, interpret: Any) -> jax.Array:
    """Loads a reference in a register layout; jax 0.10 asks for an index, later versions do not."""
    if interpret is not None:
        return ref[...]
    index = inspect.signature(plgpu.load).parameters.get("idx")
    needs_index = index is not None and index.default is index.empty
    return plgpu.load(ref, *([()] if needs_index else []), layout=layout, optimized=False)


def store(ref: Any, value: jax.Array, interpret: Any) -> None:
    """Stores registers. From jax 0.12 on, a store that may have bank conflicts must say so."""
    if interpret is None and hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def source_column(
    gather: Gather, word: jax.Array, corner: tuple[jax.Array, jax.Array], image: jax.Array
) -> jax.Array:
    """First column in the source of an entry at an output pixel.

    It lies beyond the end of the source where the shifted pixel is outside the image.
    """
    y, x = corner[0] + ((word >> 16 & 0xFF) - 128), corner[1] + (word >> 24)
    height, width = gather.source
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    column = jnp.where(inside, (y * width + x) * gather.images + image, gather.beyond)
    return pl.multiple_of(column, 64)


def source_rows(gather: Gather, word: jax.Array) -> Any:
    """The source rows of an entry."""
    return pl.ds(pl.multiple_of((word & 0xFFFF) * gather.run, 8), gather.run)


def words(
    lists: Any, list_index: jax.Array, first: jax.Array, count: int
) -> Iterator[tuple[int, jax.Array]]:
    """Entries `[list_index, first:first + count]` with their numbers.

    The loads of 8 entries are in flight together.
    """
    for start in range(0, count, 8):
        numbers = range(start, min(start + 8, count))
        yield from list(zip(numbers, [lists[list_index, first + number] for number in numbers]))


def divide(number: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Quotient and remainder of a number that is not negative."""
    return lax.div(number, size), lax.rem(number, size)


def launch(body: Any, blocks: int, tile: Tile, out: Any, scratch: list[Any], interpret: Any) -> Any:
    """A kernel of so many thread blocks, without automatic barriers (see the top of this file)."""
    kernel = plgpu.kernel(
        body,
        out_type=out,
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=tile.consumers + 1,
        thread_name="warpgroup",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )
    # Its numbers are int32 in all modes.
    return jax.enable_x64(False)(kernel)


def produce_and_consume(
    tile: Tile, produce: Callable[[], None], consume: Callable[[jax.Array], None]
) -> None:
    """The last warpgroup copies with few registers, the others multiply with many."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == tile.consumers)
    def _() -> None:
        if tile.consumers == 2:
            plgpu.set_max_registers(40, action="decrease")
        produce()

    @pl.when(warpgroup < tile.consumers)
    def _() -> None:
        if tile.consumers == 2:
            plgpu.set_max_registers(232, action="increase")
        consume(warpgroup)


def wait_until_read(tile: Tile, done: jax.Array, empty: Any) -> None:
    """Waits until the last of `done` stages are read."""
    unread = jnp.minimum(done, tile.stages)

    @pl.loop(0, unread)
    def _(k: jax.Array) -> None:
        plgpu.barrier_wait(empty.at[lax.rem(done - unread + k, tile.stages)])


def multiply(
    tile: Tile,
    shape: tuple[int, int],
    count: jax.Array,
    done: jax.Array,
    full: Any,
    empty: Any,
    operands: Callable[[jax.Array], tuple[Any, Any]],
) -> jax.Array:
    """Sums the products of `count` stages, the ring being at step `done`.

    One product is in flight while the next stage is awaited.
    """

    def accumulate(total: Any) -> jax.Array:
        @pl.loop(0, count)
        def _(k: jax.Array) -> None:
            slot = lax.rem(done + k, tile.stages)
            plgpu.barrier_wait(full.at[slot])
            plgpu.wgmma(total, *operands(slot))
            plgpu.wgmma_wait(1)

            @pl.when(k > 0)
            def _() -> None:
                plgpu.barrier_arrive(empty.at[lax.rem(done + k - 1, tile.stages)])

        product = total[...]

        @pl.when(count > 0)
        def _() -> None:
            plgpu.barrier_arrive(empty.at[lax.rem(done + count - 1, tile.stages)])

        return product

    return pl.run_scoped(accumulate, plgpu.ACC(shape, jnp.float32))
