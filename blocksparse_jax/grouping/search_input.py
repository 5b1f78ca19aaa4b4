"""What a search for groups reads: a table of scores, the sizes it is compiled for, its counts."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

_RANDOM_WORK = 2**22  # random starts share this much work (cout * table size each)
_EXACT_WORK = 2**18  # exchanges are valued exactly up to this much work (cout^2 * runs)

Table = Float[Array, "cout taps runs"]


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


def score_table(scores: Array, kept_taps: int, channel_block: int) -> Table:
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
