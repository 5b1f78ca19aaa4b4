"""HRBP: scores of a conv kernel -> balanced groups of filters, their channels and taps."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from blocksparse_jax import _checks
from blocksparse_jax.grouping.runs_and_taps import choose, multi_hot
from blocksparse_jax.grouping.search import ascending, search
from blocksparse_jax.grouping.search_input import score_table, search_sizes
from blocksparse_jax.layout import BlockLayout, block_index, channel_layout


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
    (filters,) = ascending(jax.random.permutation(keys[0], cout).reshape(groups, group_size))
    runs = multi_hot(
        jax.random.uniform(keys[1], (groups, cin // channel_block), jnp.float32),
        kept // channel_block,
    )
    taps = multi_hot(jax.random.uniform(keys[2], (groups, kh * kw), jnp.float32), kept_taps)
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
        runs, taps, _ = choose(
            table[filters].sum(1),
            jnp.ones((len(filters), table.shape[1]), jnp.float32),
            counts,
            sizes,
            True,
        )
    if kept_taps == kh * kw:
        taps = jnp.ones((len(taps), kept_taps), jnp.float32)
    return _layout(filters, runs, taps, (kh, kw, cin, cout), kept, kept_taps)


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
