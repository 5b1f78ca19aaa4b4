"""Selection: the highest scores of an array or of each row, with exact counts."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_BISECTED = (jnp.float32, jnp.bfloat16, jnp.float16)


def ranks(scores: Float[Array, "... n"]) -> Int[Array, "... n"]:
    """Ranks the scores of each row: 0 is the highest.

    Equal scores rank by index, lower index first; NaN ranks as minus infinity.

    Args:
      scores: any shape; rows lie along the last axis.

    Returns:
      int32 ranks of the same shape.

    Example:
      >>> ranks(jnp.array([1.0, 3.0, 3.0])).tolist()
      [2, 0, 1]
    """
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    order = jnp.argsort(scores, axis=-1, stable=True, descending=True)
    places = jnp.broadcast_to(jnp.arange(scores.shape[-1], dtype=jnp.int32), scores.shape)
    zeros = jnp.zeros(scores.shape, jnp.int32)
    return jnp.put_along_axis(zeros, order, places, axis=-1, inplace=False)


def ranks_of_stored(scores: Float[Array, "... n"]) -> Int[Array, "... n"]:
    """As `ranks`, many times faster for millions of short rows: it compares all pairs.

    Only for scores that come from stored numbers without rounding, such as `|w|`: XLA may compute
    a score once for each comparison, and with two roundings the ranks would no longer be a
    permutation.

    Args:
      scores: any shape without NaN; rows lie along the last axis.

    Returns:
      int32 ranks of the same shape.

    Example:
      >>> ranks_of_stored(jnp.array([1.0, 3.0, 3.0])).tolist()
      [2, 0, 1]
    """
    index = jnp.arange(scores.shape[-1])
    other, this = scores[..., None, :], scores[..., :, None]
    ahead = (other > this) | ((other == this) & (index[None, :] < index[:, None]))
    return ahead.sum(-1, dtype=jnp.int32)


def highest(scores: Float[Array, "..."], count: Any) -> Bool[Array, "..."]:
    """Marks the `count` highest scores of an array.

    Args:
      scores: any shape.
      count: how many to mark, an int or a traced int.

    Returns:
      bool of the same shape with exactly `count` ones.

    Example:
      >>> highest(jnp.array([1.0, 3.0, 2.0]), 2).tolist()
      [False, True, True]
    """
    return highest_in_rows(scores.reshape(1, -1), count).reshape(scores.shape)


def highest_in_rows(scores: Float[Array, "rows n"], count: Any) -> Bool[Array, "rows n"]:
    """Marks the `count` highest scores of every row.

    Args:
      scores: one row for each group of weights that keeps the same count.
      count: how many to mark in each row: an int, a traced int, or one for each row `[rows, 1]`.

    Returns:
      bool of the same shape with exactly `count` ones a row.

    Example:
      >>> highest_in_rows(jnp.array([[1.0, 2.0], [4.0, 3.0]]), 1).tolist()
      [[False, True], [True, False]]
    """
    if scores.dtype not in _BISECTED or not scores.size:
        return ranks(scores) < count
    return _bisect(scores.astype(jnp.float32), jnp.asarray(count, jnp.int32))


def _bisect(scores: Float[Array, "rows n"], count: Int[Array, "..."]) -> Bool[Array, "rows n"]:
    """Marks the `count` highest scores of every row without sorting them.

    Bit by bit it finds the largest pair (score, place from the end of the row) that at least
    `count` entries reach. A loop of comparisons compiles and runs several times as fast as a sort.
    """
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, jnp.where(scores == 0, 0.0, scores))
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    key = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # ordered as the scores
    # All comparisons see one and the same key, however its computation rounds.
    key = jax.lax.optimization_barrier(key)
    length = key.shape[-1]
    from_end = jnp.arange(length - 1, -1, -1, dtype=jnp.int32)
    from_end = jnp.broadcast_to(from_end, key.shape)
    place_bits = max(1, (length - 1).bit_length())

    def reach(key_least: Array, place_least: Array) -> Bool[Array, "rows n"]:
        return (key > key_least) | ((key == key_least) & (from_end >= place_least))

    def bit(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        i, key_least, place_least, _ = state
        is_key = i < 32
        step = jnp.int32(1) << jnp.where(is_key, 31 - i, 31 + place_bits - i)
        larger_key = jnp.where(is_key, key_least + step, key_least)
        larger_place = jnp.where(is_key, place_least, place_least + step)
        number = reach(larger_key, larger_place).sum(-1, keepdims=True, dtype=jnp.int32)
        enough = number >= count
        exact = jnp.where(enough, number == count, state[3])
        return (
            i + 1,
            jnp.where(enough, larger_key, key_least),
            jnp.where(enough, larger_place, place_least),
            exact,
        )

    column = (*key.shape[:-1], 1)
    start = (
        jnp.int32(0),
        jnp.full(column, jnp.iinfo(jnp.int32).min, jnp.int32),
        jnp.zeros(column, jnp.int32),
        jnp.zeros(column, bool),
    )
    _, key_least, place_least, _ = jax.lax.while_loop(
        lambda state: (state[0] < 32 + place_bits) & ~state[3].all(), bit, start
    )
    return reach(key_least, place_least)
