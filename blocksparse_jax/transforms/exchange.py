"""The two halves of an exchange: which sets of weights stay, and which are grown in their place."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from blocksparse_jax.alike import flat, map_alike
from blocksparse_jax.layout import BlockLayout
from blocksparse_jax.patterns import Kept, Pattern, unstructured
from blocksparse_jax.patterns.block import Block
from blocksparse_jax.selection import highest_in_rows
from blocksparse_jax.transforms.leaves import Leaf

_LOWEST = jnp.finfo(jnp.float32).min


def stay_highest(
    kept: Bool[Array, "rows sets"], scores: Float[Array, "rows sets"], count: Any
) -> Bool[Array, "rows sets"]:
    """The kept sets with the highest scores.

    Args:
      kept: the sets that are kept now.
      scores: higher = stay; -inf and NaN come last.
      count: how many stay in each row, at most those that are kept: an int, traced, or `[rows, 1]`.

    Returns:
      bool, some of `kept`.

    Example:
      >>> kept = jnp.array([[True, True, False]])
      >>> stay_highest(kept, jnp.array([[1.0, 2.0, 3.0]]), 1).tolist()
      [[False, True, False]]
    """
    return highest_in_rows(jnp.where(kept, _finite(scores), -jnp.inf), count) & kept


def grow_highest(
    stays: Bool[Array, "rows sets"],
    kept: Bool[Array, "rows sets"],
    scores: Float[Array, "rows sets"],
    count: Any,
) -> Bool[Array, "rows sets"]:
    """The sets that stay and those that are grown, the highest scores among all others.

    A pruned set whose score is -inf must not grow: every dropped set comes before it, so that the
    count stays.

    Args:
      stays: the sets that stay.
      kept: the sets that were kept before; those of them that do not stay were dropped.
      scores: higher = grow.
      count: how many are grown in each row, as in `stay_highest`.

    Returns:
      bool, `stays` and `count` more in each row.

    Example:
      >>> stays, kept = jnp.array([[True, False, False]]), jnp.array([[True, True, False]])
      >>> grow_highest(stays, kept, jnp.array([[9.0, 1.0, 2.0]]), 1).tolist()
      [[True, False, True]]
    """
    scores = jnp.where(stays, -jnp.inf, jnp.where(kept, _finite(scores), scores))
    return stays | highest_in_rows(scores, count)


def with_sets(pattern: Pattern, sets: Bool[Array, "rows sets"], leaf: Leaf) -> Kept:
    """What a leaf keeps: a layout moves with as many sets as before, a marker stays as it is."""
    if isinstance(leaf.layout, BlockLayout):
        return pattern.move(sets, leaf.mask, leaf.layout)
    return Kept(pattern.mask(sets, leaf.mask.shape), leaf.layout)


def refuse_fixed_counts(pattern: Pattern, method: str) -> None:
    """ValueError for a pattern whose counts a method that changes them cannot change."""
    if isinstance(pattern, Block):
        raise ValueError(
            f"pattern: {method} changes how many sets of weights are kept, and the counts of "
            f"HRBP's blocks are shapes, got {pattern}; use patterns.one_by_n(...), "
            "patterns.kernel() or patterns.unstructured()"
        )
    if pattern.density is not None:
        raise ValueError(
            f"pattern: {pattern} fixes its own density {pattern.density:g}, and {method} changes "
            "how many sets of weights are kept; use rigl with this pattern"
        )


def _finite(scores: Float[Array, "rows sets"]) -> Float[Array, "rows sets"]:
    """The scores, with the lowest float32 for -inf and NaN."""
    return jnp.where(scores > -jnp.inf, scores.astype(jnp.float32), _LOWEST)


def map_layers(
    function: Callable[[Any, Any], Kept],
    pattern: Pattern,
    layers: Mapping[str, tuple[Leaf, Array]],
    static: Mapping[str, Hashable],
) -> dict[str, Kept]:
    """As `map_alike`; single weights do not see the shape of their layer, so its size decides.

    Args:
      function: called as `function((leaf, number), static)`.
      pattern: of the layers.
      layers: name -> the leaf and what else belongs to it.
      static: name -> what is fixed about it.

    Returns:
      What is kept of each layer.
    """
    if pattern != unstructured():
        return map_alike(function, layers, static)
    kept = map_alike(function, flat(layers), static)
    return {
        name: Kept(kept[name].mask.reshape(leaf.mask.shape), leaf.layout)
        for name, (leaf, _) in layers.items()
    }
