"""Two kernels on Mosaic GPU for Hopper: `gather_product` (forward and input gradient) and
`gather_outer` (weight gradient).

Both read rows of an activation matrix `[channels, pixels * images]` by a list. An entry of a list
names a run of rows and an offset in pixels: the copy engine (TMA) brings the run, shifted, into
swizzled shared memory as a piece of a matrix operand. A shifted pixel outside the image is asked
for beyond the end of the matrix, where the copy engine fills in zeros: padding costs neither a copy
nor memory traffic. One warpgroup copies ahead through a ring of stages, the others multiply (wgmma)
into float32 registers.

`gather_product` is persistent: each thread block takes tile after tile, and copies for the next
tile run during the end of the last one. The blocks of output rows (groups) vary fastest over the
tiles: what reads the same pixels runs at the same time and meets in the L2 cache.

Pallas would put a barrier of the 128 threads of a warpgroup before every copy and around every
store; it is told not to, and order comes from the barriers that are written here (all waits and
arrivals are those of 128 threads):

- The ring: a copy into a stage follows the copying thread's own wait on `empty`, where every
  multiplying thread arrives after its share of the products is done. A fast warp cannot pass a slow
  one by a round: the next phase of `full` and `empty` needs the slow one's arrivals.
- The staging memory: `wait_smem_to_gmem` (the thread that stores waits until its bulk stores have
  read it; then a barrier) comes before anything is written there, `commit_smem` (a fence to the
  copy engine; then a barrier) between the writes and the next stores.
- A residual lies in the staging memory before the result does. Its reads and the writes that follow
  have the same layout (the layout of the sums, without an exchange between threads), so each thread
  overwrites just what it has read itself.
- Nothing else is both read and written: lists, counts, weights and the vectors at the end are only
  read, the result is only written.
"""

import functools
import inspect
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse_conv.mosaic_gpu.tiles import MULTIPROCESSORS, Rows, Tile

SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
FLIPS = not hasattr(plgpu, "InterpretGPUParams")
"""Whether the interpreter needs transposed operands in memory: that of jax 0.10 multiplies no transposed references."""
OUTSIDE = 1 << 20
"""Added to a pixel's coordinate, it puts all its taps outside the image."""


def _load(ref: Any, layout: Any, interpret: Any) -> jax.Array:
    if interpret is not None:
        return ref[...]
    idx = inspect.signature(plgpu.load).parameters.get("idx")  # jax 0.10 asks for an index
    index = ((),) if idx is not None and idx.default is idx.empty else ()
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def _store(ref: Any, value: jax.Array, interpret: Any) -> None:
    if interpret is None and hasattr(
        plgpu, "store"
    ):  # jax 0.12: a store that may have bank conflicts says so
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def _columns(
    rows: Rows, word: jax.Array, corner: tuple[jax.Array, jax.Array], image: jax.Array
) -> jax.Array:
    """First column in the source of an entry at an output pixel; beyond the end where that lies
    outside the image.
    """
    y, x = corner[0] + ((word >> 16 & 0xFF) - 128), corner[1] + (word >> 24)
    inside = (y >= 0) & (y < rows.source[0]) & (x >= 0) & (x < rows.source[1])
    return pl.multiple_of(
        jnp.where(inside, (y * rows.source[1] + x) * rows.images + image, rows.beyond), 64
    )


def _run(rows: Rows, word: jax.Array) -> Any:
    return pl.ds(pl.multiple_of((word & 0xFFFF) * rows.run, 8), rows.run)


def _words(
    lists: Any, this: jax.Array, first: jax.Array, count: int
) -> Iterator[tuple[int, jax.Array]]:
    """Entries `[this, first:first + count]` with their numbers; the loads of 8 are in flight
    together.
    """
    for start in range(0, count, 8):
        numbers = range(start, min(start + 8, count))
        yield from list(zip(numbers, [lists[this, first + e] for e in numbers]))


def _split(number: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Quotient and remainder of a number that is not negative."""
    return lax.div(number, size), lax.rem(number, size)


def _launch(
    body: Any, blocks: int, tile: Tile, out: Any, scratch: list[Any], interpret: Any
) -> Any:
    return plgpu.kernel(
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


def _roles(tile: Tile, produce: Any, consume: Any) -> None:
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


def _drain(tile: Tile, done: jax.Array, empty: Any) -> None:
    """Waits until the last stages are read."""
    left = jnp.minimum(done, tile.stages)

    @pl.loop(0, left)
    def _(k: jax.Array) -> None:
        plgpu.barrier_wait(empty.at[lax.rem(done - left + k, tile.stages)])


def _multiply(
    tile: Tile,
    shape: tuple[int, int],
    count: jax.Array,
    done: jax.Array,
    full: Any,
    empty: Any,
    operands: Any,
) -> jax.Array:
    """Sums the products of `count` stages, the ring being at step `done`; one product is in flight
    while the next stage is awaited.
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


def gather_product(
    rows: Rows,
    tile: Tile,
    counts: jax.Array,
    lists: jax.Array,
    weights: jax.Array,
    source: jax.Array,
    places: jax.Array | None,
    out_rows: int,
    *,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    relu: bool = False,
    interpret: Any = None,
    processors: int = MULTIPROCESSORS,
) -> jax.Array:
    """For each block b of output rows and each phase: `out[places[b]] = act(scale[b] * (weights[b]
    @ gathered rows) + bias[b] + residual)`.

    Args:
      rows: geometry.
      tile: tile sizes; `tile.images` divides `rows.images`; with several pixels in a tile
        `rows.run` is 8.
      counts: int32 `[phases * blocks]`, stages of `tile.depth` gathered rows that each list fills.
      lists: int32 `[phases * blocks, n]`, entries (see `entry`); an entry past the end of the
        source gives zeros.
      weights: `[phases * blocks, tile.rows, n * rows.run]`.
      source: `[channels, pixels * images]`.
      places: int32 `[blocks, g]`, the output rows of a block, g at most `tile.rows`; None: block b
        has the `tile.rows` rows from `b * tile.rows` on, as far as there are.
      out_rows: rows of the output; without `places` a multiple of 8.
      scale, bias: float32 `[blocks, tile.rows]`.
      residual: `[out_rows, pixels * images]`; only with `places`.
      relu: whether `act` is `max(., 0)`.
      interpret: None, or the parameters of Pallas' interpreter.
      processors: thread blocks at a time.

    Returns:
      `[out_rows, pixels * images]` in the source's dtype.
    """
    dtype, blocks = source.dtype, weights.shape[0] // rows.phases
    group = 1 if places is None else places.shape[1]
    lines = math.gcd(tile.rows, out_rows)  # rows that are stored together, without places
    width = tile.columns // tile.consumers  # of a warpgroup
    piece = min(tile.images, width)  # columns that lie together in memory
    # Rows that are stored one by one are 16 bytes longer, so that threads do not meet in a bank; a
    # residual's copies into them forbid it.
    pitch = piece + 8 if places is not None and residual is None else piece
    pieces, in_tile, entries = width // piece, tile.columns // tile.images, tile.depth // rows.run
    across, down = rows.images // tile.images, -(-math.prod(rows.phase_size) // in_tile)
    tiles = across * down * rows.phases * blocks
    launched = min(processors, tiles)
    placed = math.prod(rows.phase_size)
    optional = (places, scale, bias, residual)

    def where(number: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Block, phase, first image and first pixel of a tile."""
        number, block = _split(number, blocks)
        number, phase = _split(number, rows.phases)
        number, image = _split(number, across)
        return block, phase, image * tile.images, number * in_tile

    def body(counts, lists, weights, source, *others):
        others = list(others)
        places_ref, scale_ref, bias_ref, residual_ref = (
            others.pop(0) if a is not None else None for a in optional
        )
        out, w_ring, x_ring, staged, full, empty, ready = others
        first = lax.axis_index("block")
        mine = lax.div(tiles - first + launched - 1, launched)

        def fetch_tile(i, done):
            block, phase, image, pixel = where(first + i * launched)
            this, corners = phase * blocks + block, []
            for t in range(in_tile):
                y, x = _split(pixel + t, rows.phase_size[1])
                corners.append(
                    (y * rows.step[0] + jnp.where(pixel + t < placed, 0, OUTSIDE), x * rows.step[1])
                )
            count = counts[this]

            @pl.loop(0, count)
            def _(k):
                slot = lax.rem(done + k, tile.stages)

                @pl.when(done + k >= tile.stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                plgpu.copy_gmem_to_smem(
                    weights.at[this, :, pl.ds(k * tile.depth, tile.depth)],
                    w_ring.at[slot],
                    full.at[slot],
                )
                for e, word in _words(lists, this, k * entries, entries):
                    for t, corner in enumerate(corners):
                        columns = pl.ds(_columns(rows, word, corner, image), tile.images)
                        to = x_ring.at[
                            slot, pl.ds(e * rows.run, rows.run), pl.ds(t * tile.images, tile.images)
                        ]
                        plgpu.copy_gmem_to_smem(
                            source.at[_run(rows, word), columns], to, full.at[slot]
                        )

            return done + count

        def each_piece(warpgroup, where_, use):
            """Calls use(exists, first column of the output, place in the staging memory) for what
            lies together.
            """
            _, phase, image, pixel = where_
            for p in range(pieces):
                t, offset = _split(warpgroup * width + p * piece, tile.images)
                y, x = _split(pixel + t, rows.phase_size[1])
                phase_y, phase_x = _split(phase, rows.spread[1])
                y, x = y * rows.spread[0] + phase_y, x * rows.spread[1] + phase_x
                exists = (pixel + t < placed) & (y < rows.output[0]) & (x < rows.output[1])
                use(
                    exists,
                    (y * rows.output[1] + x) * rows.images + image + offset,
                    warpgroup * pieces + p,
                )

        def finish_tile(warpgroup, i, done):
            at = where(first + i * launched)
            block = at[0]
            count = counts[at[1] * blocks + block]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the staging memory is free again

            def fetch_residual(exists, column, place):
                column = jnp.where(exists, column, math.prod(rows.output) * rows.images)

                @pl.loop(0, group)
                def _(r):
                    from_ = residual_ref.at[
                        places_ref[block, r], pl.ds(pl.multiple_of(column, 64), piece)
                    ]
                    plgpu.copy_gmem_to_smem(from_, staged.at[place, r], ready.at[warpgroup])

            if residual_ref is not None:
                each_piece(warpgroup, at, fetch_residual)
            mine_ = pl.ds(pl.multiple_of(warpgroup * width, 64), width)
            operands = lambda slot: (w_ring.at[slot], x_ring.at[slot, :, mine_])  # noqa: E731
            product = _multiply(tile, (tile.rows, width), count, done, full, empty, operands)
            for ref, apply in ((scale_ref, jnp.multiply), (bias_ref, jnp.add)):
                if ref is not None:
                    factor = _load(ref.at[block], plgpu.Layout.WGMMA.reduce(1), interpret)
                    product = apply(product, lax.broadcast_in_dim(factor, product.shape, (0,)))
            if residual_ref is not None:
                plgpu.barrier_wait(ready.at[warpgroup])
            for p in range(pieces):
                y = product[:, p * piece : (p + 1) * piece]
                place = (
                    staged.at[warpgroup * pieces + p]
                    if pitch == piece
                    else staged.at[warpgroup * pieces + p, :, pl.ds(0, piece)]
                )
                if residual_ref is not None:
                    y += _load(place, plgpu.Layout.WGMMA, interpret).astype(jnp.float32)
                _store(place, (jnp.maximum(y, 0) if relu else y).astype(dtype), interpret)
            plgpu.commit_smem()

            def store(exists, column, place):
                columns = pl.ds(pl.multiple_of(column, 64), piece)

                @pl.when(exists)
                def _():
                    if places_ref is not None:

                        @pl.loop(0, group)
                        def _(r):
                            from_ = (
                                staged.at[place, r]
                                if pitch == piece
                                else staged.at[place, r, pl.ds(0, piece)]
                            )
                            plgpu.copy_smem_to_gmem(
                                from_, out.at[places_ref[block, r], columns], commit_group=False
                            )

                        return
                    for line in range(0, tile.rows, lines):
                        row = pl.multiple_of(block * tile.rows + line, lines)

                        @pl.when(row < out_rows)
                        def _(line=line, row=row):
                            from_, to = (
                                staged.at[place, pl.ds(line, lines)],
                                out.at[pl.ds(row, lines), columns],
                            )
                            plgpu.copy_smem_to_gmem(from_, to, commit_group=False)

            each_piece(warpgroup, at, store)
            plgpu.commit_smem_to_gmem_group()
            return done + count

        def consume(warpgroup):
            lax.fori_loop(0, mine, functools.partial(finish_tile, warpgroup), jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        _roles(
            tile,
            lambda: _drain(tile, lax.fori_loop(0, mine, fetch_tile, jnp.int32(0)), empty),
            consume,
        )

    scratch = [
        plgpu.SMEM((tile.stages, tile.rows, tile.depth), dtype, transforms=SWIZZLED),
        plgpu.SMEM((tile.stages, tile.depth, tile.columns), dtype, transforms=SWIZZLED),
        plgpu.SMEM(
            (tile.columns // piece, tile.rows, pitch),
            dtype,
            transforms=SWIZZLED if places is None else (),
        ),
        plgpu.Barrier(num_barriers=tile.stages, num_arrivals=1 + entries * in_tile),
        plgpu.Barrier(num_barriers=tile.stages, num_arrivals=tile.consumers),
        plgpu.Barrier(num_barriers=tile.consumers, num_arrivals=group * pieces),
    ]
    out = jax.ShapeDtypeStruct((out_rows, math.prod(rows.output) * rows.images), dtype)
    kernel = _launch(body, launched, tile, out, scratch, interpret)
    return kernel(counts, lists, weights, source, *(a for a in optional if a is not None))


def gather_outer(
    rows: Rows,
    tile: Tile,
    lists: jax.Array,
    source: jax.Array,
    grouped: jax.Array,
    group: int,
    *,
    interpret: Any = None,
) -> jax.Array:
    """Partial sums over pixels of `grouped[g] @ gathered source rows^T`, one for each share of the
    pixels.

    Args:
      rows: geometry of the forward pass.
      tile: tile sizes; `tile.depth == tile.images`.
      lists: int32 `[groups, n]`, entries (see `entry`), `n * rows.run` a multiple of
        `tile.columns`.
      source: `[channels, pixels * images]`.
      grouped: `[groups * group, output pixels * images]`, the rows of a group together.
      group: rows of a group, a multiple of 8 and at most `tile.rows`.
      interpret: None, or the parameters of Pallas' interpreter.

    Returns:
      float32 `[splits, groups, tile.rows, n * rows.run]`; rows from `group` on are undefined.
    """
    dtype, groups = source.dtype, lists.shape[0]
    entries, width = tile.columns // rows.run, tile.columns // tile.consumers
    parts = lists.shape[1] // entries
    across = rows.images // tile.images
    steps = math.prod(rows.output) * across
    share = -(-steps // tile.splits)

    def body(lists, source, grouped, out, y_ring, x_ring, full, empty, *flipped):
        number, g = _split(lax.axis_index("block"), groups)
        split, part = _split(number, parts)
        count = jnp.maximum(jnp.minimum(share, steps - split * share), 0)

        def produce():
            @pl.loop(0, count)
            def _(k):
                slot = lax.rem(k, tile.stages)
                pixel, image = _split(split * share + k, across)
                y, x = _split(pixel, rows.output[1])
                corner = (y * rows.step[0], x * rows.step[1])

                @pl.when(k >= tile.stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                column = pl.multiple_of(pixel * rows.images + image * tile.images, 64)
                from_ = grouped.at[
                    pl.ds(pl.multiple_of(g * group, 8), group), pl.ds(column, tile.images)
                ]
                plgpu.copy_gmem_to_smem(from_, y_ring.at[slot, pl.ds(0, group)], full.at[slot])
                for e, word in _words(lists, g, part * entries, entries):
                    columns = pl.ds(_columns(rows, word, corner, image * tile.images), tile.images)
                    to = x_ring.at[slot, pl.ds(e * rows.run, rows.run)]
                    plgpu.copy_gmem_to_smem(source.at[_run(rows, word), columns], to, full.at[slot])

            _drain(tile, count, empty)

        def consume(warpgroup):
            mine = pl.ds(pl.multiple_of(warpgroup * width, 64), width)

            def operands(slot):
                if not flipped:
                    return y_ring.at[slot], x_ring.at[slot, mine].transpose((1, 0))
                flipped[0][warpgroup] = x_ring[slot, mine].T
                return y_ring.at[slot], flipped[0].at[warpgroup]

            product = _multiply(
                tile, (tile.rows, width), count, jnp.int32(0), full, empty, operands
            )
            to = out.at[
                split,
                g,
                :,
                pl.ds(pl.multiple_of(part * tile.columns + warpgroup * width, 64), width),
            ]
            _store(to, product, interpret)

        _roles(tile, produce, consume)

    scratch = [
        plgpu.SMEM((tile.stages, tile.rows, tile.depth), dtype, transforms=SWIZZLED),
        plgpu.SMEM((tile.stages, tile.columns, tile.depth), dtype, transforms=SWIZZLED),
        plgpu.Barrier(num_barriers=tile.stages, num_arrivals=1 + entries),
        plgpu.Barrier(num_barriers=tile.stages, num_arrivals=tile.consumers),
    ]
    if interpret is not None and FLIPS:
        scratch.append(plgpu.SMEM((tile.consumers, tile.depth, width), dtype))
    out = jax.ShapeDtypeStruct((tile.splits, groups, tile.rows, parts * tile.columns), jnp.float32)
    return _launch(body, groups * parts * tile.splits, tile, out, scratch, interpret)(
        lists, source, grouped
    )
