"""The kernels of channel spaces, how many channels a sparsity leaves, and their masks."""

import bisect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from blocksparse_jax import _checks, tree
from blocksparse_jax.grouping.channel_spaces import Spaces, checked_spaces

Counts = Mapping[str, int]
KeptChannels = Mapping[str, Bool[np.ndarray, " c"]]
_GRID = 4096  # fractions of channels that are tried for a sparsity


def channel_counts(
    params: PyTree, spaces: Spaces, sparsity: float, *, where: tree.Where | None = None
) -> dict[str, int]:
    """How many channels each space keeps so that its kernels lose a fraction of their weights.

    Every space keeps the same fraction of its channels, at least one. A kernel between two spaces
    loses input channels and filters, so that half of the channels leave a quarter of its weights.

    Args:
      params: the parameters, any pytree of arrays or shapes.
      spaces: `{space: [(leaf name, axis), ...]}`, as in `fold_channel_orders`; names that the
        params do not have (batch statistics) are skipped.
      sparsity: fraction of the chosen weights to remove, in [0, 1); whole channels come as close
        to it as they can.
      where: predicate (name, leaf) of the kernels whose weights are counted, default conv kernels
        except the stem; the others lose channels alike.

    Returns:
      `{space: channels to keep}`.

    Raises:
      ValueError: a bad sparsity, or spaces that do not fit the params.

    Example:
      >>> params = {"a": jnp.ones((3, 3, 8, 16)), "b": jnp.ones((3, 3, 16, 8))}
      >>> channel_counts(params, {"in": [("a", 2)], "mid": [("a", 3), ("b", 2)]}, 0.75)
      {'in': 3, 'mid': 6}
    """
    _checks.fraction("sparsity", sparsity)
    sizes = space_sizes(kernel_shapes(params, spaces), spaces)
    fractions = [step / _GRID for step in range(_GRID + 1)]
    recipes = [
        {space: max(1, round(fraction * size)) for space, size in sizes.items()}
        for fraction in fractions
    ]
    return closest_counts(tree.shapes(tree.choose(where, params)), spaces, recipes, sparsity)


def channel_masks(params: PyTree, spaces: Spaces, kept: KeptChannels) -> PyTree:
    """The masks of kernels whose spaces keep some channels.

    Under them the network computes what the smaller network does: nobody reads a removed channel,
    whatever its norm and its shortcut make of it.

    Args:
      params: the parameters, any pytree of arrays.
      spaces: as in `channel_counts`.
      kept: `{space: bool vector of its channels}`, True = kept; spaces left out keep all.

    Returns:
      A tree of the params' structure: bool masks for the kernels of the spaces, and the scalar True
      for all other leaves, norms and biases among them.

    Raises:
      ValueError: spaces that do not fit the params, or a `kept` that is no bool vector of a space.

    Example:
      >>> params = {"a": jnp.ones((1, 2)), "b": jnp.ones((2, 1))}
      >>> masks = channel_masks(params, {"s": [("a", 1), ("b", 0)]}, {"s": np.array([False, True])})
      >>> masks["a"].tolist(), masks["b"].tolist()
      ([[False, True]], [[False], [True]])
    """
    shapes = kernel_shapes(params, spaces)
    sizes = space_sizes(shapes, spaces)
    keeps = {space: _as_mask(space, channels, sizes) for space, channels in kept.items()}
    masks: dict[str, Array] = {name: jnp.ones(shape, bool) for name, shape in shapes.items()}
    for space, name, axis in _entries(spaces):
        if name in shapes and space in keeps:
            rank = len(shapes[name])
            others = [other for other in range(rank) if other != axis % rank]
            masks[name] &= jnp.expand_dims(jnp.asarray(keeps[space]), others)
    return jax.tree.map_with_path(
        lambda path, leaf: masks.get(tree.path_name(path), jnp.asarray(True)), params
    )


def kernel_shapes(params: PyTree, spaces: Spaces) -> dict[str, tuple[int, ...]]:
    """The shapes of the kernels in the spaces, by name: leaves of two or more axes."""
    names = {name for _, name, _ in _entries(spaces)}
    leaves = ((tree.path_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(params))
    shapes = {
        name: tuple(jnp.shape(leaf)) for name, leaf in leaves if name in names and leaf.ndim > 1
    }
    if not shapes:
        raise ValueError(
            f"spaces: expected names of kernels of the params, got {sorted(names)[:8]}, of which "
            "the params have none of two or more axes"
        )
    return shapes


def space_sizes(shapes: Mapping[str, tuple[int, ...]], spaces: Spaces) -> dict[str, int]:
    """The channels of each space; ValueError where its kernels disagree or there is none."""
    leaves = {name: jax.ShapeDtypeStruct(shape, bool) for name, shape in shapes.items()}
    sizes = checked_spaces(spaces, [leaves], missing_ok=True)
    missing = [space for space in spaces if space not in sizes]
    if missing:
        raise ValueError(
            f"spaces[{missing[0]!r}]: the params have none of its kernels "
            f"{[name for name, _ in spaces[missing[0]]][:4]}"
        )
    return sizes


def closest_counts(
    shapes: Mapping[str, tuple[int, ...]],
    spaces: Spaces,
    recipes: Sequence[dict[str, int]],
    sparsity: float,
) -> dict[str, int]:
    """The counts, of several from small to large, that come closest to a sparsity."""
    target = (1 - sparsity) * sum(math.prod(shape) for shape in shapes.values())

    def weights(counts: Counts) -> int:
        kept = {name: list(shape) for name, shape in shapes.items()}
        for space, name, axis in _entries(spaces):
            if name in kept:
                kept[name][axis] = counts[space]
        return sum(math.prod(shape) for shape in kept.values())

    above = bisect.bisect_left(recipes, target, key=weights)
    nearest = recipes[max(0, above - 1) : above + 1]
    return min(nearest, key=lambda counts: abs(weights(counts) - target))


def writers(shapes: Mapping[str, tuple[int, ...]], spaces: Spaces, space: str) -> list[str]:
    """The kernels whose filters are the channels of a space."""
    return _kernels_by_axis(shapes, spaces, space, from_last=1)


def readers(shapes: Mapping[str, tuple[int, ...]], spaces: Spaces, space: str) -> list[str]:
    """The kernels that read the channels of a space: their axis before the last counts them."""
    return _kernels_by_axis(shapes, spaces, space, from_last=2)


def check_counts(counts: Counts, sizes: Mapping[str, int]) -> dict[str, int]:
    """The counts; ValueError unless each is of a space, at least 1 and at most its channels."""
    for space, count in counts.items():
        if space not in sizes:
            raise ValueError(
                f"counts: {space!r} is no channel space, expected names among {list(sizes)[:8]}"
            )
        if _checks.positive_int(f"counts[{space!r}]", count) > sizes[space]:
            raise ValueError(
                f"counts[{space!r}]: expected at most the space's {sizes[space]} channels, got "
                f"{count}"
            )
    return dict(counts)


def highest(scores: np.ndarray, count: int) -> Bool[np.ndarray, " c"]:
    """Which scores are the highest; equal scores go to the lower number."""
    kept = np.zeros(len(scores), bool)
    kept[np.argsort(-scores, kind="stable")[:count]] = True
    return kept


def _kernels_by_axis(
    shapes: Mapping[str, tuple[int, ...]], spaces: Spaces, space: str, from_last: int
) -> list[str]:
    return [
        name
        for name, axis in spaces[space]
        if name in shapes and axis % len(shapes[name]) == len(shapes[name]) - from_last
    ]


def _entries(spaces: Spaces) -> list[tuple[str, str, int]]:
    return [(space, name, axis) for space, entries in spaces.items() for name, axis in entries]


def _as_mask(space: str, channels: Any, sizes: Mapping[str, int]) -> np.ndarray:
    """Which channels of a space are kept, checked."""
    if space not in sizes:
        raise ValueError(
            f"kept: {space!r} is no channel space, expected names among {list(sizes)[:8]}"
        )
    mask = _checks.concrete(f"kept[{space!r}]", channels)
    if mask.dtype != bool or mask.shape != (sizes[space],):
        raise ValueError(
            f"kept[{space!r}]: expected a bool vector of the space's {sizes[space]} channels, True "
            f"= kept, got {mask.dtype}{list(mask.shape)}"
        )
    return mask
