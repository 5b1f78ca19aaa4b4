"""Channel growth: channels that nothing makes and nothing reads become active (NeST's neurons).

The arrays keep their shapes: a dormant channel is one whose weights are all pruned.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from blocksparse_jax import _checks, tree
from blocksparse_jax.grouping.channel_spaces import Spaces, kernel_axes


class GrownChannels(NamedTuple):
    """What `grow_channels` returns.

    Attributes:
      params: with the weights of the grown channels.
      masks: which keep them.

    Example:
      >>> GrownChannels._fields
      ('params', 'masks')
    """

    params: PyTree
    masks: PyTree


def dormant_channels(
    params: PyTree, masks: PyTree, spaces: Spaces
) -> dict[str, Bool[np.ndarray, " c"]]:
    """The channels that no kept weight makes and none reads.

    Args:
      params: the parameters, arrays or shapes.
      masks: a tree of bool masks, the scalar True for dense leaves, concrete.
      spaces: `{space: [(leaf name, axis), ...]}`, as in `fold_channel_orders`.

    Returns:
      `{space: bool vector}`, True = dormant; a space with a dense kernel, whose channels are always
      active, is left out.

    Raises:
      ValueError: spaces that do not fit the params.

    Example:
      >>> params = {"a": jnp.ones((1, 2)), "b": jnp.ones((2, 1))}
      >>> masks = {"a": jnp.array([[True, False]]), "b": jnp.array([[False], [False]])}
      >>> dormant_channels(params, masks, {"s": [("a", 1), ("b", 0)]})["s"].tolist()
      [False, True]
    """
    kept = {name: np.asarray(mask) for name, mask in _named(masks).items()}
    return {
        space: ~np.any([_active(kept[name], axis) for name, axis in ends], axis=0)
        for space, ends in kernel_axes(spaces, params, _is_kernel).items()
        if all(kept[name].ndim for name, _ in ends)
    }


def grow_channels(
    loss_fn: Callable[[PyTree, Any], Array],
    params: PyTree,
    batch: Any,
    masks: PyTree,
    spaces: Spaces,
    counts: Mapping[str, int],
    *,
    candidates: int = 4,
    key: Array | None = None,
) -> GrownChannels:
    """Activates dormant channels, with those of several random kernels that lower the loss most.

    A grown channel gets as many weights in each kernel, at random positions between it and active
    channels, as the kernel's density says, at least one. They are drawn from a normal distribution
    whose scale is the root mean square of the kernel's kept weights. Of all candidates, each a set
    of such weights for all grown channels, the one of the lowest loss on the batch stays.

    Args:
      loss_fn: (params, batch) -> loss.
      params: the parameters, pruned weights zero, concrete.
      batch: what the loss is computed on.
      masks: a tree of bool masks, the scalar True for dense leaves, concrete.
      spaces: as in `dormant_channels`.
      counts: `{space: channels to grow}`, the first dormant ones.
      candidates: sets of kernels to choose from.
      key: JAX random key; None is `jax.random.key(0)`.

    Returns:
      The parameters and masks with the grown channels; the other weights are as they were.

    Raises:
      ValueError: a bad argument, or a space with fewer dormant channels.

    Example:
      >>> params = {"a": jnp.array([[2.0, 0.0]]), "b": jnp.array([[3.0], [0.0]])}
      >>> masks = {"a": params["a"] != 0, "b": params["b"] != 0}
      >>> loss_fn = lambda params, batch: -(batch @ params["a"] @ params["b"]).sum()
      >>> spaces, counts = {"s": [("a", 1), ("b", 0)]}, {"s": 1}
      >>> grown = grow_channels(loss_fn, params, jnp.ones((1, 1)), masks, spaces, counts)
      >>> grown.masks["a"].tolist(), bool(loss_fn(grown.params, jnp.ones((1, 1))) < -6)
      ([[True, True]], True)

    Reference: Dai et al., "NeST: a neural network synthesis tool based on a grow-and-prune
    paradigm", IEEE Transactions on Computers 2019: its feature maps grow by the best of several
    random sets of kernels. Our choice: the number of weights and their scale; the neurons of dense
    layers grow alike, where the paper connects the most correlated pair of neurons around them.
    """
    candidates = _checks.positive_int("candidates", candidates)
    key = _checks.random_key("key", key)
    dormant = dormant_channels(params, masks, spaces)
    new = {space: _first(space, count, dormant) for space, count in counts.items() if count}
    if not new:
        return GrownChannels(params, masks)
    ends = {
        space: entries
        for space, entries in kernel_axes(spaces, params, _is_kernel).items()
        if space in new
    }
    best, lowest = None, math.inf
    for candidate in range(candidates):
        rng = np.random.default_rng(
            np.asarray(jax.random.key_data(jax.random.fold_in(key, candidate)))
        )
        drawn = _drawn(params, masks, ends, new, rng)
        loss = float(loss_fn(drawn.params, batch))
        if best is None or loss < lowest or math.isnan(lowest):
            best, lowest = drawn, loss
    assert best is not None
    return best


def _drawn(
    params: PyTree,
    masks: PyTree,
    ends: dict[str, list[tuple[str, int]]],
    new: dict[str, np.ndarray],
    rng: np.random.Generator,
) -> GrownChannels:
    """Random kernels for the new channels."""
    weights = {name: np.array(leaf) for name, leaf in _named(params).items()}
    kept = {name: np.array(mask) for name, mask in _named(masks).items()}
    active = {
        (name, axis): _active(mask, axis)
        for name, mask in kept.items()
        for axis in range(mask.ndim - 2, mask.ndim)
    }
    for space, entries in ends.items():
        for name, axis in entries:
            active[name, axis] = active[name, axis] | new[space]
    grown = set[str]()
    for space, entries in ends.items():
        for name, axis in entries:
            old = np.asarray(_named(masks)[name])
            other = 2 * old.ndim - 3 - axis  # the other one of the last two axes
            live = [_active(old, one).sum() for one in (axis, other)]
            density = old.sum() / max(1, math.prod(old.shape[:-2]) * live[0] * live[1])
            rest = np.moveaxis(old, axis, 0)[0].shape
            reach = np.broadcast_to(_along(active[name, other], other, old.ndim), old.shape)
            reach = np.moveaxis(reach, axis, 0)
            count = max(1, round(density * reach[0].sum()))
            scale = np.sqrt(np.square(weights[name], dtype=np.float64).sum() / max(1, old.sum()))
            for channel in np.flatnonzero(new[space]):
                places = rng.permutation(np.flatnonzero(reach[channel]))[:count]
                values = rng.normal(size=count) * (scale or math.sqrt(2 / count))
                index = np.unravel_index(places, rest)
                np.moveaxis(kept[name], axis, 0)[channel][index] = True
                np.moveaxis(weights[name], axis, 0)[channel][index] = values[: len(places)]
            grown.add(name)
    return GrownChannels(
        *(
            tree.replace(
                one, {name: jnp.asarray(arrays[name]) for name in grown}, is_leaf=lambda node: False
            )
            for one, arrays in ((params, weights), (masks, kept))
        )
    )


def _first(space: str, count: int, dormant: Mapping[str, np.ndarray]) -> np.ndarray:
    """The first dormant channels of a space."""
    if space not in dormant:
        raise ValueError(
            f"counts: {space!r} is no channel space whose kernels are all sparse, expected names "
            f"among {list(dormant)[:8]}"
        )
    _checks.positive_int(f"counts[{space!r}]", count)
    if count > dormant[space].sum():
        raise ValueError(
            f"counts[{space!r}]: expected at most its {dormant[space].sum()} dormant channels, got "
            f"{count}"
        )
    return dormant[space] & (np.cumsum(dormant[space]) <= count)


def _is_kernel(name: str, leaf: Any) -> bool:
    return leaf.ndim > 1


def _active(mask: np.ndarray, axis: int) -> np.ndarray:
    """Whether a channel of an axis has a kept weight."""
    return np.asarray(mask.any(tuple(other for other in range(mask.ndim) if other != axis)))


def _along(vector: np.ndarray, axis: int, rank: int) -> np.ndarray:
    return np.expand_dims(vector, [other for other in range(rank) if other != axis])


def _named(leaves: PyTree) -> dict[str, Any]:
    return {tree.path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(leaves)}
