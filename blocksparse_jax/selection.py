"""Selection: the highest scores of an array or of each row, with exact counts."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_LARGE = 2**17  # scores; fewer are sorted, which takes half as long to compile
_AS_FLOAT32 = (jnp.float32, jnp.bfloat16, jnp.float16)


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
    return _ranks(scores)


# Outside of jit one program, not one for every operation; inside nothing changes.
@functools.partial(jax.jit, inline=True)
def _ranks(scores: Array) -> Array:
    if scores.dtype in _AS_FLOAT32:
        order = jnp.argsort(~_key(scores), axis=-1, stable=True)
    else:
        scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
        order = jnp.argsort(scores, axis=-1, stable=True, descending=True)
    return jnp.argsort(order, axis=-1).astype(jnp.int32)


def _key(scores: Float[Array, "..."]) -> Int[Array, "..."]:
    """int32 in the order of the scores; equal for -0.0 and 0.0, and for NaN and minus infinity."""
    scores = scores.astype(jnp.float32)
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, jnp.where(scores == 0, 0.0, scores))
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


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
    comes_first = jnp.broadcast_to(index[None, :] < index[:, None], (*scores.shape, len(index)))
    other, this = scores[..., None, :], scores[..., :, None]
    ahead = (other > this) | ((other == this) & comes_first)
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
    if scores.size < _LARGE or scores.dtype not in _AS_FLOAT32:
        return ranks(scores) < count
    return bisect(scores, count)


def bisect(scores: Float[Array, "... n"], count: Any) -> Bool[Array, "... n"]:
    """As `highest_in_rows`, without sorting: many times as fast from some 100,000 scores on.

    Bit by bit it raises a threshold, a pair of score and place, that at least `count` scores of a
    row reach. The marks are those of the last comparison, so their number is exact however the
    computation of a score rounds.

    Args:
      scores: float32 or shorter floats; rows lie along the last axis.
      count: as in `highest_in_rows`.

    Returns:
      bool of the same shape with exactly `count` ones a row.

    Example:
      >>> bisect(jnp.array([1.0, 3.0, 3.0]), 1).tolist()
      [False, True, False]
    """
    return _bisect(scores, count)


@functools.partial(jax.jit, inline=True)
def _bisect(scores: Array, count: Any) -> Array:
    key = _key(scores)
    place = jax.lax.broadcasted_iota(jnp.int32, key.shape, key.ndim - 1)
    place_bits = (key.shape[-1] - 1).bit_length()

    def bit(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        least, end, kept = state
        of_key = i < 32
        step = jnp.left_shift(jnp.int32(1), jnp.where(of_key, 31 - i, 31 + place_bits - i))
        higher, nearer = jnp.where(of_key, least + step, least), jnp.where(of_key, end, end - step)
        reached = (key > higher) | ((key == higher) & (place < nearer))
        enough = reached.sum(-1, keepdims=True, dtype=jnp.int32) >= count
        return (
            jnp.where(enough, higher, least),
            jnp.where(enough, nearer, end),
            jnp.where(enough, reached, kept),
        )

    column = (*key.shape[:-1], 1)
    start = (
        jnp.full(column, jnp.iinfo(jnp.int32).min, jnp.int32),
        jnp.full(column, 1 << place_bits, jnp.int32),
        jnp.ones(key.shape, bool),
    )
    return jax.lax.fori_loop(0, 32 + place_bits, bit, start)[2]
