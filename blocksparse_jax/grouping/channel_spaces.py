"""Orders of channels for whole networks, folded into the parameters before training.

Nothing is permuted while the network trains. A channel space is all axes of a network that count
the same channels: `{space: [(leaf name, axis), ...]}`. An order of them changes the parameters, not
the function:

    orders = channel_orders(params, spaces, 0.9, channel_block=8)
    params, batch_stats = fold_channel_orders(spaces, orders, params, batch_stats)
    method = hrbp_prune(0.9, channel_block=8)
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PyTree

from blocksparse_jax import _checks, budgets, tree
from blocksparse_jax import scores as scores_
from blocksparse_jax.counts import block_counts
from blocksparse_jax.grouping.channel_order import Consumer, channel_order

Spaces = Mapping[str, Sequence[tuple[str, int]]]


def space_consumers(
    params: PyTree,
    spaces: Spaces,
    sparsity: float,
    *,
    channel_block: int,
    group_size: int = 32,
    block_density: float | None = None,
    budget: budgets.Budget = "uniform",
    scores: scores_.Kind | PyTree = "magnitude",
    where: tree.Where | None = None,
) -> dict[str, dict[str, Consumer]]:
    """The sparse conv kernels that read each channel space, with the counts of `hrbp_prune`.

    Args:
      params: any pytree of arrays.
      spaces: `{space: [(leaf name, axis), ...]}`, as in `fold_channel_orders`.
      sparsity: fraction of the chosen weights to remove, in [0, 1).
      channel_block: channels are kept in runs of this many; a layer whose channels it does not
        divide uses the largest divisor below it.
      group_size: filters in a group; likewise the largest divisor of the filters.
      block_density: fraction of the taps that a block keeps, in (0, 1]; None as in `hrbp_prune`.
      budget: "uniform", "erk", "er", or a map layer name -> sparsity.
      scores: "magnitude" or a tree of arrays; the other kinds are not known before training.
      where: predicate (name, leaf) of the sparse leaves, default conv kernels except the stem.

    Returns:
      `{space: {leaf name: consumer}}`; a space that no sparse conv kernel reads is left out.

    Raises:
      ValueError: a bad argument, a space that does not fit the params, or a chosen leaf that is no
        conv kernel.

    Example:
      >>> params = {"a": jnp.ones((3, 3, 3, 64)), "b": jnp.ones((3, 3, 64, 64))}
      >>> spaces = space_consumers(params, {"s": [("a", 3), ("b", 2)]}, 0.9, channel_block=8)
      >>> [(name, consumer.kept, consumer.kept_taps) for name, consumer in spaces["s"].items()]
      [('b', 56, 1)]
    """
    if isinstance(scores, str) and scores != "magnitude":
        raise ValueError(
            f"scores: expected 'magnitude' or a tree of arrays, got {scores!r}; an order needs "
            f"scores before training"
        )
    checked_spaces(spaces, [params], missing_ok=True)
    chosen = tree.choose(where, params)
    shapes = {
        name: _checks.kernel_shape(f"params[{name!r}]", leaf.shape) for name, leaf in chosen.items()
    }
    runs = {
        name: _checks.divisor(shape[2], _checks.positive_int("channel_block", channel_block))
        for name, shape in shapes.items()
    }
    densities = budgets.layer_densities(budget, shapes, sparsity)
    counts = block_counts(shapes, densities, block_density=block_density, channel_blocks=runs)
    by_name = scores_.make(scores, chosen, None, jax.random.key(0))
    size = {
        name: _checks.divisor(shape[3], _checks.positive_int("group_size", group_size))
        for name, shape in shapes.items()
    }
    read = {
        space: [name for name, axis in entries if name in shapes and axis in (2, -2)]
        for space, entries in spaces.items()
    }
    return {
        space: {name: Consumer(by_name[name], size[name], *counts[name]) for name in names}
        for space, names in read.items()
        if names
    }


def channel_orders(
    params: PyTree, spaces: Spaces, sparsity: float, *, channel_block: int, **options: Any
) -> dict[str, Int[np.ndarray, " cin"]]:
    """An order of every channel space of a network, for `hrbp_prune` with the same arguments.

    Args:
      params: as they are before training.
      spaces: `{space: [(leaf name, axis), ...]}`, as in `fold_channel_orders`.
      sparsity: as in `hrbp_prune`.
      channel_block: as in `hrbp_prune`.
      **options: further ones of `space_consumers`. Scores given as a tree must be folded too before
        they go to `hrbp_prune`.

    Returns:
      `{space: order}`, each as from `channel_order`; a space that no sparse conv kernel reads is
      left out.

    Raises:
      ValueError: as `space_consumers`, or consumers of one space that differ in their channels.

    Example:
      >>> params = {"a": jnp.ones((3, 3, 3, 64)), "b": jnp.ones((3, 3, 64, 64))}
      >>> spaces = {"s": [("a", 3), ("b", 2)]}
      >>> orders = channel_orders(params, spaces, 0.9, channel_block=8)
      >>> (params,) = fold_channel_orders(spaces, orders, params)
      >>> # and train these with hrbp_prune(0.9, channel_block=8)
    """
    consumers = space_consumers(params, spaces, sparsity, channel_block=channel_block, **options)
    blocks = {
        space: _checks.divisor(next(iter(named.values())).scores.shape[2], channel_block)
        for space, named in consumers.items()
    }
    return {
        space: channel_order(list(named.values()), channel_block=blocks[space])
        for space, named in consumers.items()
    }


def fold_channel_orders(
    spaces: Spaces, orders: Mapping[str, Int[np.ndarray, " cin"]], *trees: PyTree
) -> tuple[PyTree, ...]:
    """Reorders the channels of a network's parameters; the function stays the same.

    A space is `{"hidden": [("conv1/kernel", 3), ("norm1/scale", 0), ("norm1/bias", 0),
    ("norm1/mean", 0), ("norm1/var", 0), ("conv2/kernel", 2)]}`: every axis of every leaf that
    counts the same channels. Producers have them on a kernel's last axis (and the bias), norms on
    their only one (statistics too), consumers on a kernel's input axis: 2 of a conv, 0 of a dense
    layer behind a pool. A residual stream is one space: all convs that add to it, all that read it.
    A depthwise kernel `[kh, kw, 1, c]` has them on axis 3, in one space with what comes before and
    behind. Leave out what must keep its order: images, logits, and channels that are flattened
    together with pixels. Then the function is unchanged up to the rounding of sums in another
    order.

    Fold before `tx.init`.

    Args:
      spaces: `{space: [(leaf name, axis), ...]}`, names as of `blocksparse_jax.tree.path_name`.
      orders: `{space: order}` for some or all of the spaces, as from `channel_orders`;
        `np.argsort(order)` takes an order back.
      *trees: the params and, if there are any, the batch statistics; every leaf of `spaces` must be
        in one of them.

    Returns:
      The trees, reordered.

    Raises:
      ValueError: a leaf that no tree has, an axis out of range, of another size or in two spaces,
        or an order that is none.

    Example:
      >>> params = {"a": jnp.array([[1., 2.]]), "b": jnp.array([[3.], [4.]])}
      >>> spaces, orders = {"s": [("a", 1), ("b", 0)]}, {"s": np.array([1, 0])}
      >>> (folded,) = fold_channel_orders(spaces, orders, params)
      >>> folded["a"].tolist(), folded["b"].tolist()
      ([[2.0, 1.0]], [[4.0], [3.0]])
      >>> (params["a"] @ params["b"]).item() == (folded["a"] @ folded["b"]).item()
      True

    Reference: Pool and Yu, "Channel permutations for N:M sparsity", NeurIPS 2021, who fold their
    permutations into the parameters in the same way.
    """
    sizes = checked_spaces(spaces, trees)
    moves: dict[str, list[tuple[int, np.ndarray]]] = {}
    for space, order in orders.items():
        if space not in spaces:
            raise ValueError(
                f"orders: {space!r} is no channel space, expected names among {list(spaces)[:8]}"
            )
        checked = _checks.permutation(f"orders[{space!r}]", order, sizes.get(space))
        for name, axis in spaces[space]:
            moves.setdefault(name, []).append((axis, checked))

    def move(path: tuple[Any, ...], leaf: Any) -> Any:
        for axis, order in moves.get(tree.path_name(path), ()):
            leaf = jnp.take(leaf, order, axis=axis)
        return leaf

    return tuple(jax.tree.map_with_path(move, params) for params in trees)


def kernel_axes(
    spaces: Spaces, params: PyTree, where: tree.Where
) -> dict[str, list[tuple[str, int]]]:
    """The chosen leaves of each space and the axes that count its channels, from 0.

    Of a kernel, the last axis makes the channels and the one before it reads them.

    Args:
      spaces: `{space: [(leaf name, axis), ...]}`; names that the params do not have are skipped.
      params: the parameters, arrays or shapes.
      where: predicate (name, leaf) of the leaves.

    Returns:
      `{space: [(leaf name, axis), ...]}`; a space without such leaves is left out.

    Raises:
      ValueError: a space that does not fit the params.
    """
    checked_spaces(spaces, [params], missing_ok=True)
    ranks = {
        name: leaf.ndim
        for path, leaf in jax.tree.leaves_with_path(params)
        if where(name := tree.path_name(path), leaf)
    }
    axes = {
        space: [(name, axis % ranks[name]) for name, axis in entries if name in ranks]
        for space, entries in spaces.items()
    }
    return {space: entries for space, entries in axes.items() if entries}


def checked_spaces(
    spaces: Spaces, trees: Sequence[PyTree], missing_ok: bool = False
) -> dict[str, int]:
    """The number of channels of each space; params alone lack the batch statistics."""
    shapes = {
        tree.path_name(path): jnp.shape(leaf)
        for params in trees
        for path, leaf in jax.tree.leaves_with_path(params)
    }
    sizes, space_of = dict[str, int](), dict[tuple[str, int], str]()
    for space, entries in spaces.items():
        for name, axis in entries:
            if name not in shapes and missing_ok:
                continue
            if (shape := shapes.get(name)) is None:
                raise ValueError(
                    f"spaces[{space!r}]: no tree has a leaf {name!r}, expected names such as "
                    f"{list(shapes)[:8]}"
                )
            if not -len(shape) <= axis < len(shape):
                raise ValueError(
                    f"spaces[{space!r}]: axis {axis} of {name!r} is out of range, its shape is "
                    f"{shape}"
                )
            if shape[axis] != sizes.setdefault(space, shape[axis]):
                raise ValueError(
                    f"spaces[{space!r}]: axis {axis} of {name!r} {shape} has {shape[axis]} "
                    f"channels, expected {sizes[space]}"
                )
            other = space_of.setdefault((name, axis % len(shape)), space)
            if other != space:
                raise ValueError(
                    f"spaces[{space!r}]: axis {axis} of {name!r} is in {other!r} too; make them "
                    f"one space"
                )
    return sizes
