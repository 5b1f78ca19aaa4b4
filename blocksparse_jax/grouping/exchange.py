"""Exchanges of filters between groups that raise the kept score: the moves of the search."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from blocksparse_jax.grouping.search_input import Counts, Sizes, Table

GAIN = 3e-6  # relative gains below this are float32 noise


def exchange_filters(
    by_tap: Float[Array, "taps runs cout"], order: Array, runs: Array, taps: Array
) -> Int[Array, " cout"]:
    """The exchanges that gain with channels and taps fixed: a permutation of places in `order`."""
    groups = len(taps)
    group, here = jnp.arange(groups), jnp.arange(len(order))
    score = jnp.einsum(
        "gtr,trf->gf", taps[:, :, None] * runs[:, None, :], by_tap, precision="highest"
    )[:, order]
    score = score.reshape(groups, groups, -1).swapaxes(0, 1)  # [from, to, member]
    now = score[group, group][:, None]
    loss = now + GAIN * jnp.abs(now) - score
    rank = _ascending_ranks(loss)
    member = _inverse(rank)  # [from, to, rank]
    gain = -jnp.take_along_axis(loss, member, axis=-1)
    both = gain + gain.swapaxes(0, 1)
    both = jnp.take_along_axis(both, rank, axis=-1)  # [from, to, member]
    best = jnp.argmax(both, axis=1)  # [from, member]: the group to go to
    rank = jnp.take_along_axis(rank, best[:, None], axis=1)[:, 0]
    match = member[best, group[:, None], rank]
    partner = jnp.where(
        both.max(1) > 0, best * loss.shape[-1] + match, here.reshape(best.shape)
    ).reshape(-1)
    return jnp.where(partner[partner] == here, partner, here)


def _ascending_ranks(values: Float[Array, "*rows n"]) -> Int[Array, "*rows n"]:
    """The place of each value in its sorted row; the lower index comes first in a tie.

    By comparing all pairs: on a CPU several times as fast as sorting so many short rows.
    """
    index = jnp.arange(values.shape[-1])
    other, this = values[..., None, :], values[..., :, None]
    is_lower = jnp.broadcast_to(index[None, :] < index[:, None], (*values.shape, len(index)))
    is_before = (other < this) | ((other == this) & is_lower)
    return is_before.sum(-1, dtype=jnp.int32)


def _inverse(permutation: Int[Array, "*rows n"]) -> Int[Array, "*rows n"]:
    """Of each row, the inverse permutation."""
    rows = permutation.reshape(-1, permutation.shape[-1])
    places = jnp.broadcast_to(jnp.arange(rows.shape[1], dtype=jnp.int32), rows.shape)
    inverse = (
        jnp.zeros_like(places)
        .at[jnp.arange(len(rows))[:, None], rows]
        .set(places, unique_indices=True)
    )
    return inverse.reshape(permutation.shape)


def exchange_exact(
    table: Table, order: Array, taps: Array, values: Array, counts: Counts, sizes: Sizes
) -> Int[Array, " cout"]:
    """The best exchange of every two groups that pick each other, their channels chosen anew.

    Quadratic in the filters.
    """
    cout, here = len(order), jnp.arange(len(order))
    group = here // sizes.group_size
    # [group, place, run]
    added = jnp.einsum("ftr,gt->gfr", table[order], taps, precision="highest")
    apart = (
        added.reshape(len(taps), len(taps), sizes.group_size, -1).sum(2)[group, group]
        - added[group, here]
    )
    is_run = jnp.arange(table.shape[-1]) < counts.channels
    # [place, other]: what the group of place keeps with other in its stead
    by_run = jnp.where(is_run, apart[:, None] + added[group], -jnp.inf)
    largest = jax.lax.top_k(by_run, sizes.most_runs)[0]
    exchanged = jnp.where(jnp.arange(sizes.most_runs) < counts.runs, largest, 0).sum(-1)
    gain = exchanged - (values + GAIN * jnp.abs(values))[group][:, None]
    gain = jnp.where(group[:, None] == group[None, :], 0, gain + gain.T).reshape(len(taps), -1)
    best = gain.max(1, keepdims=True)
    this, other = here[:, None], here[None, :]
    code = (jnp.minimum(this, other) * cout + jnp.maximum(this, other)).reshape(gain.shape)
    pair = jnp.where(gain == best, code, cout * cout).min(1)
    first, second = pair // cout, pair % cout
    agreed = (best[:, 0] > 0) & (pair[group[first]] == pair[group[second]])
    first, second = (jnp.where(agreed, place, cout) for place in (first, second))
    return here.at[first].set(second, mode="drop").at[second].set(first, mode="drop")
