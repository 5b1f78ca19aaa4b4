"""Grouping many layers: those that differ in their channels and counts share a compiled search.

Compilation is most of what a first call costs. A search depends on the filters, on the taps and on
the number of channels by its shapes; with the channels padded to those of the widest layer and the
counts as numbers, one program serves all layers of as many filters.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from blocksparse_jax import run_once
from blocksparse_jax.alike import map_alike
from blocksparse_jax.grouping.search import search
from blocksparse_jax.grouping.search_input import Counts, Sizes, score_table, search_sizes
from blocksparse_jax.kernels import Kernels
from blocksparse_jax.layout import BlockLayout


class Blocks(NamedTuple):
    """The blocks of a leaf: see `hrbp_groups`."""

    of: Kernels
    group_size: int
    kept: int
    kept_taps: int
    channel_block: int


class _Found(NamedTuple):
    """What a search found; lists begin with what is kept."""

    filters: Array
    runs: Array
    taps: Array
    has_run: Bool[Array, "runs cout"]
    has_tap: Bool[Array, "taps cout"]


def group_together(
    scores: Sequence[Float[Array, "..."]], blocks: Sequence[Blocks]
) -> list[tuple[Bool[Array, "..."], BlockLayout]]:
    """Groups the filters of many leaves as `hrbp_groups` does those of one.

    Args:
      scores: of the leaves.
      blocks: their blocks.

    Returns:
      The mask, in the leaf's shape, and the layout of each leaf.

    Example:
      >>> blocks = Blocks(Kernels((), (8, 4)), 2, 4, 1, 1)
      >>> ((mask, layout),) = group_together([jnp.ones((8, 4))], [blocks])
      >>> int(mask.sum()), layout.packed_shape
      (16, (2, 4, 1, 2))
    """
    blocks, arrays = tuple(blocks), list(scores)
    if run_once.is_traced(arrays):
        layers, sizes = _layers(_tables(arrays, blocks), blocks)
        return _finish(list(map_alike(_find, layers, sizes).values()), blocks)
    on_cpu = jax.default_backend() == "cpu"
    tables = (_tables_unoptimized if on_cpu else _tables_optimized)(arrays, blocks)
    layers, sizes = _layers(tables, blocks)
    found = _search_all(layers, sizes, on_cpu)
    finish = _finish_unoptimized if on_cpu else _finish_optimized
    return finish([found[place] for place in layers], blocks)


def _search_all(
    layers: dict[str, tuple[Array, Counts]], sizes: dict[str, Sizes], on_cpu: bool
) -> dict[str, _Found]:
    """What the search of every kernel finds.

    XLA compiles a program on one core: those of all searches are compiled side by side, the long
    ones first.
    """

    def find_of(place: str) -> Any:
        is_small = on_cpu and len(layers[place][0]) < _MANY_FILTERS
        return _find_unoptimized if is_small else _find_optimized

    order = sorted(layers, key=lambda place: -len(layers[place][0]))
    programs: dict[Any, Future[Any]] = {}
    found = {}
    with ThreadPoolExecutor() as pool:
        for place in order:
            key = layers[place][0].shape, sizes[place]
            if key not in programs:
                lowered = find_of(place).lower(layers[place], sizes[place])
                programs[key] = pool.submit(lowered.compile)
        for place in order:
            programs[layers[place][0].shape, sizes[place]].result()
            found[place] = find_of(place)(layers[place], sizes[place])  # compiled by now
    return found


def _layers(
    tables: list[Array], blocks: Sequence[Blocks]
) -> tuple[dict[str, tuple[Array, Counts]], dict[str, Sizes]]:
    """What the search of every kernel reads, and its static sizes."""
    layers, sizes = {}, {}
    for place, (table, (counts, size)) in enumerate(zip(tables, _searches(blocks), strict=True)):
        layers[str(place)] = table, Counts(*(np.int32(count) for count in counts))
        sizes[str(place)] = size
    return layers, sizes


class _Key(NamedTuple):
    """Layers that agree in it share a search."""

    cout: int
    positions: int
    group_size: int
    exact: bool


def _searches(blocks: Sequence[Blocks]) -> list[tuple[Counts, Sizes]]:
    """The counts of every kernel, and the sizes that its search shares with others."""
    alone = []
    for leaf in blocks:
        sizes, counts = search_sizes(
            _table_shape(leaf), leaf.group_size, leaf.kept // leaf.channel_block, leaf.kept_taps
        )
        alone += [(leaf, sizes, counts)] * leaf.of.count
    shared: dict[_Key, Sizes] = {}
    for leaf, sizes, _ in alone:
        other = shared.get(_key(leaf), sizes)
        shared[_key(leaf)] = sizes._replace(
            most_runs=max(sizes.most_runs, other.most_runs),
            most_taps=max(sizes.most_taps, other.most_taps),
            random_starts=max(sizes.random_starts, other.random_starts),
        )
    return [(counts, shared[_key(leaf)]) for leaf, _, counts in alone]


def _table_shape(leaf: Blocks) -> tuple[int, int, int]:
    kh, kw, cin, cout = leaf.of.conv_shape
    return cout, 1 if leaf.kept_taps == kh * kw else kh * kw, cin // leaf.channel_block


def _key(leaf: Blocks) -> _Key:
    cout, positions, _ = shape = _table_shape(leaf)
    sizes, _ = search_sizes(shape, leaf.group_size, 1, leaf.kept_taps)
    return _Key(cout, positions, leaf.group_size, sizes.exact)


def _tables(scores: list[Array], blocks: tuple[Blocks, ...]) -> list[Float[Array, "cout taps r"]]:
    """The table of every kernel, as wide as the widest that shares its search."""
    widths: dict[_Key, int] = {}
    for leaf in blocks:
        widths[_key(leaf)] = max(_table_shape(leaf)[2], widths.get(_key(leaf), 0))
    tables = []
    for leaf, array in zip(blocks, scores, strict=True):
        padding = widths[_key(leaf)] - _table_shape(leaf)[2]
        for kernel in array.reshape(leaf.of.count, *leaf.of.conv_shape):
            table = score_table(kernel, leaf.kept_taps, leaf.channel_block)
            tables.append(jnp.pad(table, ((0, 0), (0, 0), (0, padding))))
    return tables


def _find(layer: tuple[Array, Counts], sizes: Sizes) -> _Found:
    """Searches one kernel, and lists what is kept."""
    filters, runs, taps = search(*layer, sizes)
    groups = jnp.arange(len(filters), dtype=jnp.int32)
    cout = filters.size
    group_of = jnp.zeros(cout, jnp.int32).at[filters].set(groups[:, None])
    has_run, has_tap = runs > 0, taps > 0
    return _Found(
        filters.astype(jnp.int32),
        jnp.argsort(~has_run, axis=1, stable=True).astype(jnp.int32),
        jnp.argsort(~has_tap, axis=1, stable=True).astype(jnp.int32),
        has_run[group_of].T,
        has_tap[group_of].T,
    )


def _finish(
    found: list[_Found], blocks: tuple[Blocks, ...]
) -> list[tuple[Bool[Array, "..."], BlockLayout]]:
    """Masks and layouts of the leaves."""
    kernels, results = iter(found), []
    for leaf in blocks:
        kept = [_kept(next(kernels), leaf) for _ in range(leaf.of.count)]
        masks, layouts = jax.tree.map(lambda *arrays: jnp.stack(arrays), *kept)
        stack, shape = leaf.of.stack, leaf.of.shape
        results.append(
            (
                masks.reshape(*stack, *shape),
                jax.tree.map(lambda a, stack=stack: a.reshape(*stack, *a.shape[1:]), layouts),
            )
        )
    return results


def _kept(found: _Found, leaf: Blocks) -> tuple[Bool[Array, "positions cin cout"], BlockLayout]:
    """The mask, with all positions of the kernel on one axis, and the layout of one kernel."""
    kh, kw, cin, cout = leaf.of.conv_shape
    run, groups = leaf.channel_block, cout // leaf.group_size
    first = found.runs[:, : leaf.kept // run, None] * run
    channels = (first + jnp.arange(run, dtype=jnp.int32)[None, None]).reshape(groups, leaf.kept)
    if leaf.kept_taps == kh * kw:
        taps = jnp.broadcast_to(jnp.arange(kh * kw, dtype=jnp.int32), (groups, kh * kw))
    else:
        taps = found.taps[:, : leaf.kept_taps]
    has_channel = jnp.repeat(found.has_run[: cin // run], run, axis=0)
    mask = jnp.broadcast_to(found.has_tap[:, None] & has_channel[None], (kh * kw, cin, cout))
    return mask, BlockLayout(found.filters, channels, taps, leaf.of.shape, run)


_MANY_FILTERS = 512  # from which on an optimized search saves more than its compilation takes
_tables_optimized, _find_optimized, _finish_optimized = (
    jax.jit(function, static_argnums=1, compiler_options=run_once.OPTIONS)
    for function in (_tables, _find, _finish)
)
_tables_unoptimized, _find_unoptimized, _finish_unoptimized = (
    jax.jit(function, static_argnums=1, compiler_options=run_once.UNOPTIMIZED)
    for function in (_tables, _find, _finish)
)
