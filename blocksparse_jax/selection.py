"""Selection: the highest scores of an array or of each row, with exact counts."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


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
    return (ranks(scores.reshape(-1)) < count).reshape(scores.shape)


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
    return ranks(scores) < count
