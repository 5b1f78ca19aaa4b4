"""What a method sees: the leaves that it prunes, by name, and the step."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from blocksparse_jax import tree
from blocksparse_jax.layout_nodes import Layout
from blocksparse_jax.state import SparseState, is_node


class Leaf(NamedTuple):
    """What a method sees of one sparse leaf.

    Attributes:
      weights: the parameter; in `on_proposed`, the proposed one.
      grad: its gradient, as it came to the method.
      mask: bool, what is kept now.
      layout: its layout, or a marker.
      memory: the method's own array, a scalar where it has none.
    """

    weights: Array
    grad: Array
    mask: Array
    layout: Layout
    memory: Array


class Step(NamedTuple):
    """When and with what a method is called.

    Attributes:
      count: int32, updates so far.
      extra: the extra arguments of `tx.update(..., **extra)`, e.g. `value` or `loss`.
    """

    count: Array  # type: ignore[assignment]  # int32[], like optax's; tuple.count or not
    extra: Mapping[str, Any]


Leaves = dict[str, Leaf]


def sparse_leaves(state: SparseState, params: PyTree, grads: PyTree) -> Leaves:
    """The leaves that a method prunes, by name; packed and dense leaves are none.

    Raises:
      ValueError: the state is of another tree, or a leaf has another shape than at init.
    """
    names = [tree.path_name(path) for path, _ in jax.tree.leaves_with_path(params)]
    masks = tree.match("state", state.masks, params, is_leaf=is_node)
    layouts = tree.match("state", state.layouts, params, is_leaf=is_node)
    gradients = tree.match("updates", grads, params)
    memory = [jnp.zeros(())] * len(names)
    if jax.tree.leaves(state.memory):
        memory = tree.match("state", state.memory, params, is_leaf=is_node)
    weights = jax.tree.leaves(params)
    leaves = {
        name: Leaf(*columns)
        for name, *columns in zip(names, weights, gradients, masks, layouts, memory, strict=True)
        if not isinstance(columns[2], optax.MaskedNode) and jnp.ndim(columns[2])
        if columns[2].size  # none where all channels were removed
    }
    for name, leaf in leaves.items():
        if leaf.mask.dtype != bool:
            raise ValueError(
                f"state: expected a bool mask at {name!r}, got {leaf.mask.dtype}: a wrapper did "
                "arithmetic with the masks. optax.lookahead(reset_state=True) does, and would take "
                "masks and step count back to the start: use reset_state=False; optax.contrib.sam "
                "does too: leave it out"
            )
        if not leaf.weights.shape == leaf.grad.shape == leaf.mask.shape:
            raise ValueError(
                f"params: expected shape {leaf.mask.shape} at {name!r} as at init, got weights "
                f"{leaf.weights.shape} and gradient {leaf.grad.shape}; packed values go with the "
                "packed state of pack_tree"
            )
    return leaves


def with_leaves(state: SparseState, leaves: Leaves) -> SparseState:
    """The state with the masks, layouts and memory of the given leaves."""
    masks = {name: leaf.mask for name, leaf in leaves.items()}
    layouts = {name: leaf.layout for name, leaf in leaves.items()}
    memory = {name: leaf.memory for name, leaf in leaves.items()}
    return state._replace(
        masks=tree.replace(state.masks, masks, is_leaf=is_node),
        layouts=tree.replace(state.layouts, layouts, is_leaf=is_node),
        memory=tree.replace(state.memory, memory, is_leaf=is_node),
    )
