"""Grouping: scores of a conv kernel -> balanced groups of filters, their channels and taps."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from blocksparse_jax import _checks
from blocksparse_jax.layout import BlockLayout, block_index, channel_layout
from blocksparse_jax.selection import bisect

_MAX_ROUNDS = 100  # of exchanges, from one start
_GAIN = 3e-6  # relative gains below this are float32 noise
_RANDOM_WORK = 2**22  # random starts share this much work (cout * table size each)
# From this many values on, bisection finds the largest: 10 times as fast as top_k on a CPU, slower
# to compile.
_BISECTED = 2**15
_EXACT_WORK = 2**18  # exchanges are valued exactly up to this much work (cout^2 * runs)

_Table = Float[Array, "cout taps runs"]


def hrbp_groups(
    scores: Float[Array, "kh kw cin cout"],
    *,
    group_size: int,
    kept: int,
    kept_taps: int,
    channel_block: int = 1,
    filters: Int[Array, "groups group_size"] | None = None,
) -> BlockLayout:
    """Groups filters, and chooses each group's channels and taps, so that the kept score is large.

    Maximises `sum_g sum_{t in taps_g} sum_{c in channels_g} sum_{f in filters_g} scores[t, c, f]`
    over all balanced groups by alternation: (a) every group keeps its best channels given its taps
    and its best taps given its channels; (b) filters are exchanged between groups. With `B[f, g]`
    the score that filter `f` would keep in group `g` and `D[f, g] = B[f, g] - B[f, group(f)]`,
    exchanging `f` and `h` gains `D[f, group(h)] + D[h, group(f)]`; each pair of groups matches its
    filters by rank of `D`, every filter picks its best match, and picks that are mutual and gain
    are exchanged at once (they are disjoint, so their gains add up exactly). Small layers then go
    on with exchanges valued with the channels chosen anew. Every step raises the score, so the
    result is never below that of consecutive filters, one of the starts; the others are a greedy
    cosine grouping and, the smaller the layer the more, random ones. The best final score wins;
    ties go to the lower index everywhere.

    Args:
      scores: `[kh, kw, cin, cout]`, higher = keep; NaN counts as 0.
      group_size: filters in a group; divides `cout`.
      kept: input channels that a group keeps.
      kept_taps: kernel positions that a group keeps, the same for all its channels (HRBP++ below
        `kh * kw`).
      channel_block: channels are kept in aligned runs of this many; divides `cin` and `kept`.
      filters: int `[groups, group_size]`, fixed groups (dynamic HRBP); then only channels and taps
        are chosen.

    Returns:
      A layout; filters, channels and taps ascend in each group, and groups ascend by first filter.
      `filters`, if given, stay as they are.

    Raises:
      ValueError: a size is out of range or does not divide, or `filters` (where its values are
        known) is no partition of the filters.

    Example:
      >>> scores = jnp.array([[9., 1., 9., 1.], [1., 9., 1., 9.]]).reshape(1, 1, 2, 4)
      >>> layout = hrbp_groups(scores, group_size=2, kept=1, kept_taps=1)
      >>> layout.filters.tolist(), layout.channels.tolist(), float(kept_score(scores, layout))
      ([[0, 2], [1, 3]], [[0], [1]], 36.0)

    Reference: Ma et al., "HRBP: Hardware-friendly Regrouping towards Block-based Pruning for Sparse
    CNN Training", CPAL 2024, which leaves the algorithm open; balanced groups and the objective
    above are our choice.
    """
    shape = _sizes(scores.shape, group_size, kept, kept_taps, channel_block)
    if filters is not None and filters.shape != (shape[3] // group_size, group_size):
        raise ValueError(
            f"filters: expected shape {(shape[3] // group_size, group_size)} (groups, group_size), "
            f"got {filters.shape}"
        )
    if filters is not None and not isinstance(filters, jax.core.Tracer):
        _checks.partition("filters", np.asarray(filters), shape[3])
    return _hrbp_groups(
        scores,
        filters,
        group_size=group_size,
        kept=kept,
        kept_taps=kept_taps,
        channel_block=channel_block,
    )


def random_groups(
    key: PRNGKeyArray,
    shape: Sequence[int],
    *,
    group_size: int,
    kept: int,
    kept_taps: int,
    channel_block: int = 1,
) -> BlockLayout:
    """Draws balanced groups, and their channels and taps, uniformly at random.

    Args:
      key: a PRNG key.
      shape: `(kh, kw, cin, cout)` of the conv kernel.
      group_size: filters in a group; divides `cout`.
      kept: input channels that a group keeps.
      kept_taps: kernel positions that a group keeps.
      channel_block: channels are kept in aligned runs of this many; divides `cin` and `kept`.

    Returns:
      A layout, sorted as that of `hrbp_groups`.

    Raises:
      ValueError: a size is out of range or does not divide.

    Example:
      >>> shape, sizes = (3, 3, 16, 32), {"group_size": 8, "kept": 4, "kept_taps": 3}
      >>> random_groups(jax.random.key(0), shape, **sizes).packed_shape
      (4, 4, 3, 8)

    Reference: the random mask initialization of Ma et al., "HRBP", CPAL 2024.
    """
    kh, kw, cin, cout = _sizes(shape, group_size, kept, kept_taps, channel_block)
    key = _checks.random_key("key", key)
    return _random_groups(key, (kh, kw, cin, cout), group_size, kept, kept_taps, channel_block)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5), inline=True)
def _random_groups(
    key: Array,
    shape: tuple[int, int, int, int],
    group_size: int,
    kept: int,
    kept_taps: int,
    channel_block: int,
) -> BlockLayout:
    kh, kw, cin, cout = shape
    groups = cout // group_size
    keys = jax.random.split(key, 3)
    (filters,) = _ascending(jax.random.permutation(keys[0], cout).reshape(groups, group_size))
    runs = _multi_hot(
        jax.random.uniform(keys[1], (groups, cin // channel_block), jnp.float32),
        kept // channel_block,
    )
    taps = _multi_hot(jax.random.uniform(keys[2], (groups, kh * kw), jnp.float32), kept_taps)
    return _layout(filters, runs, taps, shape, kept, kept_taps)


def kept_score(scores: Float[Array, "..."], layout: BlockLayout) -> Float[Array, ""]:
    """Sum of the scores that a layout keeps.

    Args:
      scores: `[kh, kw, cin, cout]`, or the shape of a dense kernel or of a stack.
      layout: a layout of that shape.

    Returns:
      A scalar, float32.

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> shape, sizes = (3, 3, 16, 32), {"group_size": 8, "kept": 4, "kept_taps": 3}
      >>> layout = random_groups(jax.random.key(0), shape, **sizes)
      >>> float(kept_score(jnp.ones(shape), layout)) == 4 * 4 * 3 * 8
      True
    """
    if scores.shape != layout.full_shape:
        raise ValueError(
            f"scores: shape {scores.shape} is not the layout's {layout.full_shape}; pass the "
            f"scores of the same conv kernel"
        )
    kh, kw, cin, cout = layout.kernels.conv_shape

    def kept(scores: Array, layout: BlockLayout) -> Array:
        return scores.reshape(kh * kw, cin, cout)[block_index(layout)].sum(dtype=jnp.float32)

    return layout.kernels.each(kept)(scores, layout).sum()


def _sizes(
    shape: Sequence[int], group_size: int, kept: int, kept_taps: int, channel_block: int
) -> tuple[int, int, int, int]:
    kh, kw, cin, cout = _checks.kernel_shape("shape", shape)
    for name, value, most in (
        ("kept", kept, cin),
        ("kept_taps", kept_taps, kh * kw),
        ("group_size", group_size, cout),
    ):
        if _checks.positive_int(name, value) > most:
            raise ValueError(
                f"{name}: expected 1..{most} for a kernel of shape {(kh, kw, cin, cout)}, got "
                f"{value}"
            )
    if cout % group_size:
        raise ValueError(
            f"group_size: {group_size} does not divide cout={cout}; use a divisor, e.g. "
            f"{math.gcd(group_size, cout)}"
        )
    if cin % _checks.positive_int("channel_block", channel_block) or kept % channel_block:
        raise ValueError(
            f"channel_block: {channel_block} must divide cin={cin} and kept={kept}; use "
            f"{math.gcd(channel_block, cin, kept)}"
        )
    return kh, kw, cin, cout


@functools.partial(jax.jit, static_argnames=("group_size", "kept", "kept_taps", "channel_block"))
def _hrbp_groups(
    scores: Array,
    filters: Array | None,
    *,
    group_size: int,
    kept: int,
    kept_taps: int,
    channel_block: int,
) -> BlockLayout:
    kh, kw, cin, cout = scores.shape
    table = score_table(scores, kept_taps, channel_block)
    sizes, counts = search_sizes(table.shape, group_size, kept // channel_block, kept_taps)
    if filters is None:
        filters, runs, taps = search(table, counts, sizes)
    else:
        runs, taps, _ = _choose(
            table[filters].sum(1), _ones(len(filters), table.shape[1]), counts, sizes, True
        )
    if kept_taps == kh * kw:
        taps = _ones(len(taps), kept_taps)
    return _layout(filters, runs, taps, (kh, kw, cin, cout), kept, kept_taps)


class Sizes(NamedTuple):
    """What is fixed when a search is compiled; layers with other counts may share it.

    Attributes:
      group_size: filters in a group.
      most_runs: the largest number of kept runs.
      most_taps: the largest number of kept taps.
      random_starts: the largest number of random starts.
      exact: whether exchanges are valued with the channels chosen anew.
    """

    group_size: int
    most_runs: int
    most_taps: int
    random_starts: int
    exact: bool


class Counts(NamedTuple):
    """What a search reads as numbers.

    Attributes:
      channels: runs of channels that the layer has; the table may be wider.
      runs: runs that a group keeps.
      taps: taps that a group keeps.
      random_starts: random starts.
    """

    channels: Any
    runs: Any
    taps: Any
    random_starts: Any


def score_table(scores: Array, kept_taps: int, channel_block: int) -> _Table:
    """The scores as the search reads them; one tap where all are kept.

    Args:
      scores: `[kh, kw, cin, cout]`.
      kept_taps: kernel positions that a group keeps.
      channel_block: channels in a run.

    Returns:
      float32 `[cout, taps, runs]`, finite.

    Example:
      >>> score_table(jnp.ones((3, 3, 8, 16)), 9, 2).shape
      (16, 1, 4)
    """
    kh, kw, cin, cout = scores.shape
    # Corrupted scores still give a valid layout.
    table = jnp.nan_to_num(scores.astype(jnp.float32), posinf=1e30, neginf=-1e30)
    table = table.reshape(kh * kw, cin // channel_block, channel_block, cout).sum(2)
    table = table.transpose(2, 0, 1)
    # No choice of taps: one score for a kernel slice.
    return table.sum(1, keepdims=True) if kept_taps == kh * kw else table


def search_sizes(
    table_shape: Sequence[int], group_size: int, runs: int, kept_taps: int
) -> tuple[Sizes, Counts]:
    """The sizes and counts of a search in a table of that shape.

    Args:
      table_shape: `(cout, taps, runs)`.
      group_size: filters in a group.
      runs: runs that a group keeps.
      kept_taps: kernel positions that a group keeps.

    Returns:
      The sizes that fit this layer alone, and its counts.

    Example:
      >>> search_sizes((16, 1, 4), 8, 2, 9)[1]
      Counts(channels=4, runs=2, taps=1, random_starts=64)
    """
    cout, positions, channels = table_shape
    taps = min(kept_taps, positions)
    random_starts = min(_RANDOM_WORK // (cout * cout * positions * channels), 64)
    exact = cout * cout * channels <= _EXACT_WORK
    return (
        Sizes(group_size, runs, taps, random_starts, exact),
        Counts(channels, runs, taps, random_starts),
    )


class _Climber(NamedTuple):
    """Groups on their way up: `order` lists the filters group by group."""

    order: Int[Array, " cout"]
    taps: Float[Array, "groups taps"]
    runs: Float[Array, "groups runs"]
    values: Float[Array, " groups"]
    round: Int[Array, ""]


def search(table: _Table, counts: Counts, sizes: Sizes) -> list[Array]:
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
            _ones(groups, positions),
            jnp.zeros((groups, channels), jnp.float32),
            jnp.full(groups, -jnp.inf),
            first,
        )
        return _climb(table, climber, counts, sizes)

    ends = jax.lax.map(improve, (starts, first_round.astype(jnp.int32)))
    total = ends.values.sum(1)
    best = jnp.argmax(total >= total.max() - _GAIN * jnp.abs(total.max()))  # the first of the best
    return _ascending(
        ends.order[best].reshape(-1, sizes.group_size), ends.runs[best], ends.taps[best]
    )


def _climb(table: _Table, start: _Climber, counts: Counts, sizes: Sizes) -> _Climber:
    """Alternates choice and exchange until nothing moves; the last round only chooses."""
    here = jnp.arange(len(table))
    # Outside of the loop, which would else transpose in every round.
    by_tap = table.transpose(1, 2, 0)

    def climb(state: _Climber) -> _Climber:
        is_last = state.round == _MAX_ROUNDS
        sums = table[state.order.reshape(-1, sizes.group_size)].sum(1)
        runs, taps, values = _choose(
            sums, state.taps, counts, sizes, thorough=is_last | sizes.exact
        )
        places = here
        if len(taps) > 1:  # one group exchanges nothing
            places = jax.lax.cond(
                is_last, lambda: here, lambda: _exchange_filters(by_tap, state.order, runs, taps)
            )
        if len(taps) > 1 and sizes.exact:
            places = jax.lax.cond(
                is_last | (places != here).any(),
                lambda: places,
                lambda: _exchange_exact(table, state.order, taps, values, counts, sizes),
            )
        stays = (places == here).all()
        ended = jnp.where(stays & ~is_last, _MAX_ROUNDS, state.round + 1)
        return _Climber(state.order[places], taps, runs, values, ended)

    return jax.lax.while_loop(lambda state: state.round <= _MAX_ROUNDS, climb, start)


def _exchange_filters(
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
    loss = now + _GAIN * jnp.abs(now) - score
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


def _exchange_exact(
    table: _Table, order: Array, taps: Array, values: Array, counts: Counts, sizes: Sizes
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
    # [place, other]: what the group of place keeps with other in its stead
    by_run = jnp.where(_below(counts.channels, table), apart[:, None] + added[group], -jnp.inf)
    largest = jax.lax.top_k(by_run, sizes.most_runs)[0]
    exchanged = jnp.where(jnp.arange(sizes.most_runs) < counts.runs, largest, 0).sum(-1)
    gain = exchanged - (values + _GAIN * jnp.abs(values))[group][:, None]
    gain = jnp.where(group[:, None] == group[None, :], 0, gain + gain.T).reshape(len(taps), -1)
    best = gain.max(1, keepdims=True)
    this, other = here[:, None], here[None, :]
    code = (jnp.minimum(this, other) * cout + jnp.maximum(this, other)).reshape(gain.shape)
    pair = jnp.where(gain == best, code, cout * cout).min(1)
    first, second = pair // cout, pair % cout
    agreed = (best[:, 0] > 0) & (pair[group[first]] == pair[group[second]])
    first, second = (jnp.where(agreed, place, cout) for place in (first, second))
    return here.at[first].set(second, mode="drop").at[second].set(first, mode="drop")


def _choose(
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
    is_run = _below(counts.channels, sums)

    def best_runs(by_run: Float[Array, "groups runs"]) -> Float[Array, "groups runs"]:
        by_run = jnp.where(is_run, by_run, -jnp.inf)
        return _multi_hot(by_run, counts.runs, sizes.most_runs)

    if positions == 1:
        runs = best_runs(sums[:, 0])
        return runs, taps, jnp.einsum("gtr,gr->g", sums, runs, precision="highest")

    def alternate(_: Int[Array, ""], pair: tuple[Array, Array]) -> tuple[Array, Array]:
        runs = best_runs(jnp.einsum("gtr,gt->gr", sums, pair[0], precision="highest"))
        by_tap = jnp.einsum("gtr,gr->gt", sums, runs, precision="highest")
        return _multi_hot(by_tap, counts.taps, sizes.most_taps), runs

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


def _below(count: Any, array: Array) -> Bool[Array, " n"]:
    """Which places of the last axis come before a number."""
    return jnp.arange(array.shape[-1]) < count


def _cosine_order(table: _Table, group_size: int) -> Int[Array, " cout"]:
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
        still_free = free & (_multi_hot(nearness, group_size) == 0)
        return still_free, jax.lax.top_k(nearness, group_size)[1]

    everything = jnp.ones(len(rows), bool)
    return jax.lax.scan(take, everything, length=len(rows) // group_size)[1].reshape(-1)


def _ones(*shape: int) -> Array:
    return jnp.ones(shape, jnp.float32)


def _multi_hot(
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


def _layout(
    filters: Array,
    runs: Array,
    taps: Array,
    shape: tuple[int, int, int, int],
    kept: int,
    kept_taps: int,
) -> BlockLayout:
    """From multi-hot runs and taps; top_k lists equal values by ascending index."""
    positions = jax.lax.top_k(taps, kept_taps)[1].astype(jnp.int32)
    return channel_layout(filters.astype(jnp.int32), runs > 0, positions, shape, kept=kept)


def _ascending(filters: Int[Array, "groups group_size"], *others: Array) -> list[Array]:
    """Filters ascending in each group, groups by first filter; other arrays follow their groups."""
    filters = jnp.sort(filters, axis=1)
    groups = jnp.argsort(filters[:, 0])
    return [array[groups] for array in (filters, *others)]
