"""Channels that are gone for good: the network and its optimizer state become smaller.

    kept = {"conv1": jnp.abs(params["conv1"]["kernel"]).sum((0, 1, 2)) > 1e-3}
    params, batch_stats, opt_state = remove_channels(spaces, kept, params, batch_stats, opt_state)

Masks keep a network's shapes; this changes them, so jitted steps compile again.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, PyTree

from blocksparse_jax import _checks, tree
from blocksparse_jax.grouping.channel_spaces import Spaces, checked_spaces
from blocksparse_jax.layout_nodes import ConsecutiveGroups, Dense, is_layout


def remove_channels(
    spaces: Spaces,
    kept: Mapping[str, Bool[np.ndarray, " c"]],
    params: PyTree,
    *others: PyTree,
    vanishing: Collection[str] = (),
) -> tuple[PyTree, ...]:
    """Removes channels from a network: parameters, statistics, masks and optimizer state.

    Every axis that counts the same channels loses the same ones, so layers still fit each other: a
    residual stream is one space, and a channel of it goes from all convolutions that add to it and
    all that read it. The smaller network computes what the larger one does wherever nothing came
    through the removed channels: their consumers' weights are zero, or what reaches these is (a
    norm's bias does, though the convolution before it is zero).

    In `others` a leaf belongs to a parameter when its key path ends with the parameter's, as
    moments, traces, accumulators and the masks of a sparse method do, whatever wraps them; it loses
    the parameter's channels. Counts stay.

    Args:
      spaces: `{space: [(leaf name, axis), ...]}`, as in `fold_channel_orders`.
      kept: `{space: bool vector of its channels}`, True = stays, for some or all of the spaces;
        concrete values, at least one of them True but in `vanishing`.
      params: the parameters.
      *others: batch statistics, masks, scores and optimizer states; every leaf of `spaces` must be
        in `params` or in one of them. `bsj.get_masks(state)` of a new state gives the new masks.
      vanishing: spaces inside of residual branches, which may lose all channels. Their kernels have
        a size of 0 then, and the model must leave the branch out.

    Returns:
      The trees in their order, smaller; `params` first, also where there is nothing else.

    Raises:
      ValueError: a space that does not fit the trees (as `fold_channel_orders`), a `kept` that is
        no bool vector of the space or keeps no channel, a state leaf of another shape than its
        parameter, or one whose block layout does not survive.

    Example:
      >>> import optax
      >>> params = {"a": jnp.array([[1., 0., 2.]]), "b": jnp.array([[3.], [4.], [5.]])}
      >>> state = optax.trace(0.9).init(params)
      >>> spaces, kept = {"s": [("a", 1), ("b", 0)]}, {"s": np.array([True, False, True])}
      >>> smaller, state = remove_channels(spaces, kept, params, state)
      >>> smaller["a"].tolist(), smaller["b"].tolist(), state.trace["a"].shape
      ([[1.0, 2.0]], [[3.0], [5.0]], (1, 2))
      >>> (params["a"] @ params["b"]).item() == (smaller["a"] @ smaller["b"]).item()
      True

    Reference: the network reconfiguration of Lym et al., "PruneTrain", SC 2019.
    """
    trees = (params, *others)
    sizes = checked_spaces(spaces, trees)
    cuts: dict[str, list[tuple[int, np.ndarray]]] = {}
    for space, keeps in kept.items():
        if space not in spaces:
            raise ValueError(
                f"kept: {space!r} is no channel space, expected names among {list(spaces)[:8]}"
            )
        left = _indices(f"kept[{space!r}]", keeps, sizes[space], space in vanishing)
        for name, axis in spaces[space]:
            cuts.setdefault(name, []).append((axis, left))
    shapes: dict[str, tuple[int, ...]] = {}
    for one in trees:
        for path, leaf in jax.tree.leaves_with_path(one):
            shapes.setdefault(tree.path_name(path), jnp.shape(leaf))
    parameters = {tree.path_name(path) for path, _ in jax.tree.leaves_with_path(params)}
    known = parameters | set(cuts)

    def cut(path: tuple[Any, ...], leaf: Any) -> Any:
        full = tree.path_name(path)
        name = _longest_end(full, known)
        if name not in cuts:
            return leaf
        if is_layout(leaf):
            return _smaller_layout(full, leaf, shapes[name], cuts[name])
        shape = jnp.shape(leaf)
        if shape != shapes[name]:
            if np.prod(shape) == 1:  # a scalar where a method or an optimizer has no array
                return leaf
            raise ValueError(
                f"others: expected the shape {shapes[name]} of {name!r} at {full!r}, got {shape}; "
                f"which of it is whose channel is unknown, so make a new state of the smaller "
                f"params with tx.init"
            )
        for axis, left in cuts[name]:
            leaf = jnp.take(leaf, left, axis=axis)
        return leaf

    return tuple(jax.tree.map_with_path(cut, one, is_leaf=is_layout) for one in trees)


def _indices(name: str, kept: Any, size: int, may_vanish: bool) -> np.ndarray:
    """The channels that stay; ValueError unless it is a bool vector that keeps one or more."""
    array = _checks.concrete(name, kept)
    if array.dtype != np.bool_ or array.shape != (size,):
        raise ValueError(
            f"{name}: expected a bool vector of the space's {size} channels, True = kept, got "
            f"{array.dtype}{list(array.shape)}"
        )
    if not array.any() and not may_vanish:
        raise ValueError(
            f"{name}: keeps none of {size} channels, so nothing would pass; keep at least one, the "
            f"best, or name the space in `vanishing` where a shortcut leads around it"
        )
    return np.flatnonzero(array)


def _longest_end(name: str, known: set[str]) -> str | None:
    """The longest known name that a path name ends with."""
    while name not in known:
        _, separator, name = name.partition("/")
        if not separator:
            return None
    return name


def _smaller_layout(
    full: str, layout: Any, shape: tuple[int, ...], cuts: list[tuple[int, np.ndarray]]
) -> Any:
    """The layout of what is left; only one that is read from its mask can change."""
    if isinstance(layout, Dense):
        return layout
    filters = shape[-1]
    for axis, left in cuts:
        if not len(left):  # of a branch that is gone
            return Dense()
        if axis % len(shape) == len(shape) - 1:
            filters = len(left)
    if isinstance(layout, ConsecutiveGroups) and layout.packed is None:
        if layout.group_size == shape[-1]:  # one group of all filters
            return dataclasses.replace(layout, group_size=filters)
        if filters == shape[-1]:
            return layout
    raise ValueError(
        f"others: {full!r} is a block layout of {shape[-1]} filters, which does not survive the "
        f"removal; remove channels before tx.init, or under a method without a layout"
    )
