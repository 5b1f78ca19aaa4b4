"""Checks before a training state is packed or unpacked: its layouts, and what would be lost."""

import math
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from blocksparse_jax import tree
from blocksparse_jax.layout import BlockLayout, layout_to_mask
from blocksparse_jax.layout_nodes import Dense, is_layout
from blocksparse_jax.packing import equal_as_known
from blocksparse_jax.plans import without_plans
from blocksparse_jax.state import is_node, is_sparse_state


def check_masks(params: PyTree, state: PyTree, layouts: PyTree) -> None:
    """ValueError where known masks in a state are not those of the layouts to pack with."""
    for name, layout, (mask, own) in _beside_layouts(params, state, layouts):
        is_packable = not isinstance(own, Dense | optax.MaskedNode)
        if is_packable and jnp.shape(mask) == layout.full_shape and not _true(_keeps(layout, mask)):
            _refuse_foreign(name)


def check_layouts(values: PyTree, state: PyTree, layouts: PyTree) -> None:
    """ValueError where the layouts are not those that a packed state holds."""
    for name, layout, (_, own) in _beside_layouts(values, state, layouts):
        packed = own if isinstance(own, BlockLayout) else getattr(own, "packed", None)
        if packed is not None and not _is_same(packed, layout):
            _refuse_foreign(name)


def warn_of_other_shapes(params: PyTree, state: PyTree, layouts: PyTree) -> None:
    """A warning where an optimizer keeps arrays of other shapes for a weight that is packed."""
    nodes = tree.match("layouts", layouts, params, is_leaf=is_layout)
    names = [tree.path_name(path) for path, _ in jax.tree.leaves_with_path(params)]
    blocks = {
        n: node for n, node in zip(names, nodes, strict=True) if isinstance(node, BlockLayout)
    }
    others: dict[str, tuple[int, ...]] = {}

    def look(name: str | None, leaf: Any) -> None:
        is_scalar = is_sparse_state(leaf) or math.prod(jnp.shape(leaf)) == 1
        if name in blocks and not is_scalar and jnp.shape(leaf) != blocks[name].full_shape:
            others[name] = jnp.shape(leaf)

    tree.map_state(look, params, state, is_leaf=is_sparse_state)
    if others:
        name, shape = next(iter(others.items()))
        warnings.warn(
            f"state: an array of shape {shape} belongs to {name!r}, which is packed, and stays as "
            "it is, so the optimizer starts afresh or fails (adafactor, lbfgs); leave the "
            "parameters dense, which conv takes with their layouts, or take an optimizer whose "
            "moments have the shape of the weights",
            stacklevel=3,
        )


def refuse_loss(params: PyTree, state: PyTree, layouts: PyTree) -> None:
    """Raises a ValueError where packing would lose what a method still uses.

    That is, as far as the values are known: pruned weights of a straight-through method, and a
    method's own memory of pruned weights.
    """
    nodes = tree.match("layouts", layouts, params, is_leaf=is_layout)
    leaves = jax.tree.leaves_with_path(params)
    named = {
        tree.path_name(path): (leaf, layout)
        for (path, leaf), layout in zip(leaves, nodes, strict=True)
        if isinstance(layout, BlockLayout) and jnp.shape(leaf) == layout.full_shape
    }
    states = [
        node for node in jax.tree.leaves(state, is_leaf=is_sparse_state) if is_sparse_state(node)
    ]
    for sparse in states:
        pruned_by = {
            tree.path_name(path)
            for path, node in jax.tree.leaves_with_path(sparse.layouts, is_leaf=is_layout)
            if node != Dense()
        }
        memory = {
            tree.path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(sparse.memory)
        }
        for name in pruned_by & named.keys():
            leaf, layout = named[name]
            mask = layout_to_mask(layout)
            if sparse.spec.straight_through and (lost := _nonzero_outside(mask, leaf)):
                raise ValueError(
                    f"params: {sparse.spec.method} trains the pruned weights too, and packing "
                    f"would lose {lost} of them at {name!r}; once the pattern is final set them "
                    "to zero (apply_masks), or pass drop_pruned=True"
                )
            if jnp.ndim(memory.get(name, 0)) and (lost := _nonzero_outside(mask, memory[name])):
                raise ValueError(
                    f"state: {sparse.spec.method} remembers pruned weights, and packing would lose "
                    f"{lost} of its numbers at {name!r}; pack when its masks are final, with "
                    "drop_pruned=True"
                )


def _beside_layouts(
    params: PyTree, state: PyTree, layouts: PyTree
) -> Iterator[tuple[str, BlockLayout, tuple[Any, Any]]]:
    """Each leaf that has a BlockLayout: its name, the layout, and a method's mask and layout."""
    layouts = without_plans(layouts)
    names = [tree.path_name(path) for path, _ in jax.tree.leaves_with_path(params)]
    given = tree.match("layouts", layouts, params, is_leaf=is_layout)
    for sparse in filter(is_sparse_state, jax.tree.leaves(state, is_leaf=is_sparse_state)):
        masks = tree.match("state", sparse.masks, params, is_leaf=is_node)
        own = tree.match("state", sparse.layouts, params, is_leaf=is_node)
        for name, layout, *both in zip(names, given, masks, own, strict=True):
            if isinstance(layout, BlockLayout):
                yield name, layout, (both[0], both[1])


@jax.jit
def _keeps(layout: BlockLayout, mask: Array) -> Array:
    """Whether a layout keeps what a mask keeps."""
    return (layout_to_mask(layout) == mask).all()


def _is_same(one: BlockLayout, other: BlockLayout) -> bool:
    """Whether two layouts are equal, as far as their arrays are known."""
    pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
    return one.shape == other.shape and all(equal_as_known(a, b) for a, b in pairs)


def _true(flag: Array) -> bool:
    """A bool; True where it is traced."""
    return isinstance(flag, jax.core.Tracer) or bool(flag)


def _refuse_foreign(name: str) -> None:
    raise ValueError(
        f"layouts: the one at {name!r} is not that of the state, but of another seed, model or "
        "step; use get_layouts(state)"
    )


def _nonzero_outside(mask: Array, values: Array) -> int:
    """How many values outside of a mask are not zero; 0 where they are traced."""
    count = jnp.count_nonzero(jnp.where(mask, 0, values))
    return 0 if isinstance(count, jax.core.Tracer) else int(count)
