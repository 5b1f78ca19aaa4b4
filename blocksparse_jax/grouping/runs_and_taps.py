"""The runs of channels and the taps that each group keeps, given the groups."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from blocksparse_jax.grouping.search_input import Counts, Sizes
from blocksparse_jax.selection import bisect

# From this many values on, bisection finds the largest: 10 times as fast as top_k on a CPU, slower
# to compile.
_BISECTED = 2**15


def choose(
    sums: Float[Array, "groups taps runs"],
    taps: Array,
    counts: Counts,
    sizes: Sizes,
    thorough: bool | Array,
) -> tuple[Array, Array, Array]:
    """Each group's runs and taps (multi-hot) and kept score.

    Alternates from `taps` and, thorough, from all taps and from each.
    """
    groups, positions, channels = sums.shape
    is_run = jnp.arange(channels) < counts.channels

    def best_runs(by_run: Float[Array, "groups runs"]) -> Float[Array, "groups runs"]:
        by_run = jnp.where(is_run, by_run, -jnp.inf)
        return multi_hot(by_run, counts.runs, sizes.most_runs)

    if positions == 1:
        runs = best_runs(sums[:, 0])
        return runs, taps, jnp.einsum("gtr,gr->g", sums, runs, precision="highest")

    def alternate(_: Int[Array, ""], pair: tuple[Array, Array]) -> tuple[Array, Array]:
        runs = best_runs(jnp.einsum("gtr,gt->gr", sums, pair[0], precision="highest"))
        by_tap = jnp.einsum("gtr,gr->gt", sums, runs, precision="highest")
        return multi_hot(by_tap, counts.taps, sizes.most_taps), runs

    def from_seed(seed: Int[Array, ""], best: tuple[Array, ...]) -> tuple[Array, ...]:
        seeded = (seed == 1) | (jnp.arange(positions) == seed - 2)
        start = jnp.where(seed == 0, taps, seeded.astype(taps.dtype)), jnp.zeros_like(best[0])
        new_taps, runs = jax.lax.fori_loop(0, jnp.where(thorough, 4, 2), alternate, start)
        values = jnp.einsum("gtr,gt,gr->g", sums, new_taps, runs, precision="highest")
        better = values > best[2]
        return (
            jnp.where(better[:, None], runs, best[0]),
            jnp.where(better[:, None], new_taps, best[1]),
            jnp.where(better, values, best[2]),
        )

    nothing = jnp.zeros((groups, channels), jnp.float32), taps, jnp.full(groups, -jnp.inf)
    seeds = jnp.where(thorough, 2 + positions, 1)
    return jax.lax.fori_loop(0, seeds, from_seed, nothing)


def multi_hot(
    values: Float[Array, "*rows n"], count: Any, most: int | None = None
) -> Float[Array, "*rows n"]:
    """1.0 at the largest `count` entries of the last axis; the lower index wins a tie.

    A traced count is at most `most`.
    """
    if values.size < _BISECTED:
        values = jnp.where(values == 0, 0.0, values)  # top_k puts 0.0 before -0.0
        top, index = (
            jax.lax.dynamic_index_in_dim(array, count - 1, axis=-1)
            for array in jax.lax.top_k(values, count if most is None else most)
        )
        place = jax.lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 1)
        return ((values > top) | ((values == top) & (place <= index))).astype(values.dtype)
    return bisect(values, count).astype(values.dtype)
