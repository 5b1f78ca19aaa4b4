"""The search for groups: from several starts, it climbs by choices and exchanges in turn."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from blocksparse_jax.grouping.exchange import GAIN, exchange_exact, exchange_filters
from blocksparse_jax.grouping.runs_and_taps import choose, multi_hot
from blocksparse_jax.grouping.search_input import Counts, Sizes, Table

_MAX_ROUNDS = 100  # of exchanges, from one start


class _Climber(NamedTuple):
    """Groups on their way up: `order` lists the filters group by group."""

    order: Int[Array, " cout"]
    taps: Float[Array, "groups taps"]
    runs: Float[Array, "groups runs"]
    values: Float[Array, " groups"]
    round: Int[Array, ""]


def search(table: Table, counts: Counts, sizes: Sizes) -> list[Array]:
    """The best groups from all starts, with their runs and taps.

    Args:
      table: float32 `[cout, taps, runs]`; runs from `counts.channels` on are padding, and zero.
      counts: of the layer, ints or traced.
      sizes: which `counts` does not exceed.

    Returns:
      `[filters, runs, taps]`: int `[groups, group_size]` and multi-hot float32.

    Example:
      >>> table = jnp.array([[9.0, 1.0], [1.0, 9.0], [9.0, 1.0], [1.0, 9.0]])[:, None]
      >>> filters, runs, taps = search(table, Counts(2, 1, 1, 0), Sizes(2, 1, 1, 0, True))
      >>> filters.tolist(), runs.tolist()
      ([[0, 2], [1, 3]], [[1.0, 0.0], [0.0, 1.0]])
    """
    cout, positions, channels = table.shape
    groups = cout // sizes.group_size
    in_order, rng = np.arange(cout), np.random.default_rng(0)
    random = [rng.permutation(cout) for _ in range(sizes.random_starts)]
    starts = jnp.concatenate(
        [
            jnp.asarray(np.stack([in_order, in_order, *random])),
            _cosine_order(table, sizes.group_size)[None],
        ]
    )
    place = np.arange(len(starts))
    is_left_out = (place >= 2 + counts.random_starts) & (place < len(starts) - 1)
    # The first stays where it is, so that nothing falls below consecutive filters.
    first_round = jnp.where(place == 0, _MAX_ROUNDS, jnp.where(is_left_out, _MAX_ROUNDS + 1, 0))

    def improve(start: tuple[Array, Array]) -> _Climber:
        order, first = start
        climber = _Climber(
            order,
            jnp.ones((groups, positions), jnp.float32),
            jnp.zeros((groups, channels), jnp.float32),
            jnp.full(groups, -jnp.inf),
            first,
        )
        return _climb(table, climber, counts, sizes)

    ends = jax.lax.map(improve, (starts, first_round.astype(jnp.int32)))
    total = ends.values.sum(1)
    best = jnp.argmax(total >= total.max() - GAIN * jnp.abs(total.max()))  # the first of the best
    return ascending(
        ends.order[best].reshape(-1, sizes.group_size), ends.runs[best], ends.taps[best]
    )


def _climb(table: Table, start: _Climber, counts: Counts, sizes: Sizes) -> _Climber:
    """Alternates choice and exchange until nothing moves; the last round only chooses."""
    here = jnp.arange(len(table))
    # Outside of the loop, which would else transpose in every round.
    by_tap = table.transpose(1, 2, 0)

    def climb(state: _Climber) -> _Climber:
        is_last = state.round == _MAX_ROUNDS
        sums = table[state.order.reshape(-1, sizes.group_size)].sum(1)
        runs, taps, values = choose(sums, state.taps, counts, sizes, thorough=is_last | sizes.exact)
        places = here
        if len(taps) > 1:  # one group exchanges nothing
            places = jax.lax.cond(
                is_last, lambda: here, lambda: exchange_filters(by_tap, state.order, runs, taps)
            )
        if len(taps) > 1 and sizes.exact:
            places = jax.lax.cond(
                is_last | (places != here).any(),
                lambda: places,
                lambda: exchange_exact(table, state.order, taps, values, counts, sizes),
            )
        stays = (places == here).all()
        ended = jnp.where(stays & ~is_last, _MAX_ROUNDS, state.round + 1)
        return _Climber(state.order[places], taps, runs, values, ended)

    return jax.lax.while_loop(lambda state: state.round <= _MAX_ROUNDS, climb, start)


def _cosine_order(table: Table, group_size: int) -> Int[Array, " cout"]:
    """Greedy groups: the strongest free filter takes the free filters most similar to it."""
    rows = table.reshape(len(table), -1)
    strength = rows.sum(1)
    unit = rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    similar = jnp.matmul(unit, unit.T, precision="highest")

    def take(free: Array, _: None) -> tuple[Array, Array]:
        seed = jnp.argmax(jnp.where(free, strength, -jnp.inf))
        nearness = jnp.where(
            jnp.arange(len(rows)) == seed, jnp.inf, jnp.where(free, similar[seed], -jnp.inf)
        )
        still_free = free & (multi_hot(nearness, group_size) == 0)
        return still_free, jax.lax.top_k(nearness, group_size)[1]

    everything = jnp.ones(len(rows), bool)
    return jax.lax.scan(take, everything, length=len(rows) // group_size)[1].reshape(-1)


def ascending(filters: Int[Array, "groups group_size"], *others: Array) -> list[Array]:
    """Filters ascending in each group, groups by first filter; other arrays follow their groups."""
    filters = jnp.sort(filters, axis=1)
    groups = jnp.argsort(filters[:, 0])
    return [array[groups] for array in (filters, *others)]
