"""Orders of channels: similar channels side by side, so that aligned runs of them lose little.

One order of the channels that some conv kernels read; `channel_spaces` finds them for a whole
network and folds them into its parameters. The search runs on the host, in NumPy: run once and full
of sorts and branches, it would take longer to compile than to run. It asks `hrbp_groups`, compiled
as `hrbp_prune` calls it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from blocksparse_jax import _checks
from blocksparse_jax.grouping.hrbp import hrbp_groups, kept_score
from blocksparse_jax.layout import BlockLayout

_ROUNDS = 12  # of ordering and grouping
_HOT, _COLD = 1.0, 0.02  # temperatures of annealing, in standard deviations of a row's run sums
_STEPS, _SWEEPS = 12, 4  # of annealing, and of exchanges at each of its temperatures
_PAIR_SWEEPS = 16  # of exchanges that let each row choose its runs anew
_PAIR_WORK = 2**27  # they take at most this much work (rows * cin^2 each)
_GAIN = 1e-6  # relative gains below this are noise

_Rows = Float[np.ndarray, "rows cin"]
_Runs = Int[np.ndarray, " cin"]  # the run of each channel


class Consumer(NamedTuple):
    """A conv kernel that reads a channel space, and the sizes of its groups (`hrbp_groups`).

    Attributes:
      scores: `[kh, kw, cin, cout]`, higher = keep, none negative; NaN counts as 0.
      group_size, kept, kept_taps: filters, input channels and kernel positions of a group.

    Example:
      >>> Consumer(jnp.ones((3, 3, 8, 4)), group_size=2, kept=4, kept_taps=3).kept
      4
    """

    scores: Any
    group_size: int
    kept: int
    kept_taps: int


class RunRatio(NamedTuple):
    """Kept score with aligned runs, relative to single-channel lists of the same length.

    Attributes:
      ordered: with the channels in the order.
      unordered: with the channels as they were.
      single: the score of the single-channel lists.
    """

    ordered: float
    unordered: float
    single: float


def channel_order(consumers: Sequence[Consumer], *, channel_block: int) -> Int[np.ndarray, " cin"]:
    """An order of the channels of one space in which aligned runs keep a large score.

    The score is summed over all consumers. Co-clustering: starting from the groups that
    `hrbp_groups` makes with single channels, it alternates (a) every group says how much score
    `v[g, c]` each channel would keep for it (its filters and taps fixed), and the channels are
    dealt to runs of `channel_block` so that the best runs of all groups hold as much as possible;
    (b) `hrbp_groups` groups anew, with runs. In (a) membership is annealed: with `R[g, r]` the sum
    of run r for group g, `m[g, r] = sigmoid((R[g, r] - threshold[g]) / temperature)` and
    `B[c, r] = sum_g m[g, r] v[g, c]`, channels are exchanged between runs while that raises
    `sum_c B[c, run(c)]`; then the temperature falls, at last to a hard top-k, and pairs are
    exchanged with the top-k chosen anew. The best order as valued by `hrbp_groups`, the present one
    included, wins, so the result is never below that of no ordering. Deterministic.

    Args:
      consumers: at least one; all read the same channels.
      channel_block: channels in a run; divides `cin` and every `kept`.

    Returns:
      `order`, a permutation on the host: channel `order[i]` comes to place `i`, so the ordered
      scores are `scores[:, :, order]`. Channels ascend in each run, and runs by first channel.

    Raises:
      ValueError: no consumer, consumers of different `cin`, or sizes that `hrbp_groups` refuses.

    Example:
      >>> scores = jnp.array([9., 1., 9., 1.]).reshape(1, 1, 4, 1)
      >>> consumer = Consumer(scores, group_size=1, kept=2, kept_taps=1)
      >>> channel_order([consumer], channel_block=2).tolist()
      [0, 2, 1, 3]

    Reference: Ma et al., "HRBP", CPAL 2024, which leaves the permutation of channels open.
    """
    tables = _tables(consumers)
    cin = tables[0].shape[2]
    order = best = np.arange(cin)
    if channel_block == 1:
        return best
    layouts, most = _group(tables, consumers, order, channel_block)
    if all(consumer.kept == cin for consumer in consumers):
        return best
    kept_runs = np.concatenate(
        [np.full(len(lay.filters), c.kept // channel_block) for lay, c in zip(layouts, consumers)]
    )
    layouts, _ = _group(tables, consumers, order, 1)
    run_of, visited = order // channel_block, set[bytes]()
    for _ in range(_ROUNDS):
        rows = np.concatenate([_values(table, layout) for table, layout in zip(tables, layouts)])
        run_of = _anneal(rows, run_of, kept_runs)
        order = _in_order(run_of, channel_block)
        if order.tobytes() in visited:
            break
        visited.add(order.tobytes())
        layouts, total = _group(tables, consumers, order, channel_block)
        if total > most + _GAIN * abs(most):
            best, most = order, total
    return best


def run_ratio(
    consumers: Sequence[Consumer], order: Int[np.ndarray, " cin"], *, channel_block: int
) -> RunRatio:
    """What aligned runs keep of the score of single-channel lists, with and without an order.

    Args:
      consumers: of one channel space.
      order: of its channels, as from `channel_order`.
      channel_block: channels in a run.

    Returns:
      `(ordered, unordered, single)`, all grouped by `hrbp_groups` and summed over the consumers;
      1.0 where no score is kept at all.

    Raises:
      ValueError: an order that is no permutation of the channels, or as `channel_order`.

    Example:
      >>> scores = jnp.array([9., 1., 9., 1.]).reshape(1, 1, 4, 1)
      >>> consumer = Consumer(scores, group_size=1, kept=2, kept_taps=1)
      >>> run_ratio([consumer], np.array([0, 2, 1, 3]), channel_block=2)
      RunRatio(ordered=1.0, unordered=0.5555555555555556, single=18.0)
    """
    tables = _tables(consumers)
    cin = tables[0].shape[2]
    order, unchanged = _checks.permutation("order", order, cin), np.arange(cin)
    single, ordered, unordered = (
        _group(tables, consumers, o, b)[1]
        for o, b in ((unchanged, 1), (order, channel_block), (unchanged, channel_block))
    )
    return (
        RunRatio(ordered / single, unordered / single, single)
        if single
        else RunRatio(1.0, 1.0, 0.0)
    )


def _tables(consumers: Sequence[Consumer]) -> list[np.ndarray]:
    if not consumers:
        raise ValueError(
            "consumers: expected at least one conv kernel that reads the channels, got none"
        )
    tables = [
        np.nan_to_num(
            _checks.concrete("scores", c.scores).astype(np.float32), posinf=1e30, neginf=-1e30
        )
        for c in consumers
    ]
    channels = [_checks.kernel_shape("scores", table.shape)[2] for table in tables]
    if len(set(channels)) > 1:
        raise ValueError(
            f"consumers: expected kernels with the same input channels, got {channels}; they are "
            f"different spaces"
        )
    return tables


def _group(
    tables: Sequence[np.ndarray], consumers: Sequence[Consumer], order: np.ndarray, block: int
) -> tuple[list[BlockLayout], float]:
    """The layouts of all consumers with their channels in that order, and the score they keep."""
    layouts, total = list[BlockLayout](), 0.0
    for table, (_, group_size, kept, kept_taps) in zip(tables, consumers):
        scores = jnp.asarray(table[:, :, order])
        layouts.append(
            hrbp_groups(
                scores, group_size=group_size, kept=kept, kept_taps=kept_taps, channel_block=block
            )
        )
        total += float(kept_score(scores, layouts[-1]))
    return layouts, total


def _values(table: np.ndarray, layout: BlockLayout) -> _Rows:
    """What every channel would keep for each group, with the group's filters and taps."""
    flat = table.reshape(-1, *table.shape[2:])
    blocks = (
        flat[taps][:, :, filters]
        for filters, taps in zip(np.asarray(layout.filters), np.asarray(layout.taps))
    )
    return np.stack([block.sum((0, 2), dtype=np.float64) for block in blocks])


def _sums(rows: _Rows, run_of: _Runs) -> Float[np.ndarray, "rows runs"]:
    runs = np.bincount(run_of)
    return rows[:, np.argsort(run_of, kind="stable")].reshape(len(rows), len(runs), -1).sum(2)


def _hot(
    sums: Float[np.ndarray, "rows runs"], kept_runs: np.ndarray
) -> Float[np.ndarray, "rows runs"]:
    """1.0 at the largest runs of each row; the lower index wins a tie."""
    hot = np.zeros_like(sums)
    np.put_along_axis(
        hot,
        np.argsort(-sums, axis=1, kind="stable"),
        (np.arange(sums.shape[1]) < kept_runs[:, None]) * 1.0,
        axis=1,
    )
    return hot


def _threshold(
    sums: Float[np.ndarray, "rows runs"], kept_runs: np.ndarray
) -> Float[np.ndarray, "rows 1"]:
    """Between the last kept run and the first that is not."""
    place = np.stack([kept_runs - 1, np.minimum(kept_runs, sums.shape[1] - 1)], axis=1)
    return np.take_along_axis(-np.sort(-sums, axis=1), place, axis=1).mean(1, keepdims=True)


def _kept(rows: _Rows, run_of: _Runs, kept_runs: np.ndarray) -> float:
    sums = _sums(rows, run_of)
    return float((sums * _hot(sums, kept_runs)).sum())


def _anneal(rows: _Rows, run_of: _Runs, kept_runs: np.ndarray) -> _Runs:
    """Deals channels to runs, from soft memberships to hard ones, until nothing gains."""
    for temperature in np.geomspace(_HOT, _COLD, _STEPS):
        sums = _sums(rows, run_of)
        scale = temperature * np.maximum(
            sums.std(1, keepdims=True), 1e-6 * np.abs(sums).max() + 1e-30
        )
        soft = (1 + np.tanh((sums - _threshold(sums, kept_runs)) / (2 * scale))) / 2
        run_of = _exchange_channels(rows.T @ soft, run_of, _SWEEPS)
    kept = _kept(rows, run_of, kept_runs)
    while True:
        hot = _hot(_sums(rows, run_of), kept_runs)
        better = _exchange_channels(rows.T @ hot, run_of, _SWEEPS)
        value = _kept(rows, better, kept_runs)
        if value <= kept + _GAIN * abs(kept):
            return _concentrate(rows, run_of, kept_runs)
        run_of, kept = better, value


def _exchange_channels(benefit: Float[np.ndarray, "cin runs"], run_of: _Runs, sweeps: int) -> _Runs:
    """Exchanges channels between runs where that raises the sum of `benefit[c, run_of[c]]`.

    A sweep moves a channel once at most.
    """
    channels, runs = benefit.shape
    run_of, every, noise = run_of.copy(), np.arange(channels), _GAIN * np.abs(benefit).max()
    for _ in range(sweeps):
        gain = benefit - benefit[every, run_of][:, None]
        members = np.argsort(run_of, kind="stable").reshape(runs, -1)
        inside = gain[members]  # [from, member, to]
        # [from, to]: the gain of the channel that goes first, and which one it is
        offer = inside.max(1)
        first = np.take_along_axis(members, inside.argmax(1), axis=1)
        # [channel, to]: this channel goes there, and the first of those there comes here
        total = gain + offer[:, run_of].T
        total[every, run_of] = 0
        to, best, free = total.argmax(1), total.max(1), np.ones(channels, bool)
        for channel in np.argsort(-best, kind="stable"):
            if best[channel] <= noise:
                break
            other = first[to[channel], run_of[channel]] if free[channel] else channel
            if free[channel] and free[other]:
                free[channel] = free[other] = False
                run_of[channel], run_of[other] = run_of[other], run_of[channel]
        if free.all():
            break
    return run_of


def _concentrate(rows: _Rows, run_of: _Runs, kept_runs: np.ndarray) -> _Runs:
    """Exchanges pairs of channels while each row may choose its runs anew.

    A run counts by how far its sum is above the row's threshold.
    """
    kept = _kept(rows, run_of, kept_runs)
    for _ in range(min(_PAIR_SWEEPS, _PAIR_WORK // (rows.size * rows.shape[1]))):
        sums = _sums(rows, run_of)
        above = (sums - _threshold(sums, kept_runs))[:, run_of]
        gain = np.zeros((rows.shape[1],) * 2)
        for here, value in zip(above, rows):  # the run of channel c, with channel d for c
            gain += np.maximum((here - value)[:, None] + value, 0) - np.maximum(here, 0)[:, None]
        gain = np.where(run_of[:, None] == run_of, 0, gain + gain.T)
        other, best = gain.argmax(1), gain.max(1)
        moved, free = run_of.copy(), np.ones(sums.shape[1], bool)
        for channel in np.argsort(-best, kind="stable"):
            pair = [channel, other[channel]]
            # At most one exchange in a run: then gains add up.
            if best[channel] > _GAIN * kept and free[run_of[pair]].all():
                free[run_of[pair]] = False
                moved[pair] = run_of[pair[::-1]]
        value = _kept(rows, moved, kept_runs)
        if value <= kept + _GAIN * abs(kept):
            break
        run_of, kept = moved, value
    return run_of


def _in_order(run_of: _Runs, block: int) -> Int[np.ndarray, " cin"]:
    """The channels run by run, ascending in each, the runs by first channel."""
    runs = np.argsort(run_of, kind="stable").reshape(-1, block)
    return runs[np.argsort(runs[:, 0])].reshape(-1)
