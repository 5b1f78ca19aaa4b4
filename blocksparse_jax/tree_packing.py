"""Packing of a whole training state: parameters, moments and masks, and back."""

import dataclasses
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from blocksparse_jax import packing_checks, tree
from blocksparse_jax.layout import BlockLayout, layout_to_mask
from blocksparse_jax.layout_nodes import Dense, ShrinkingLayout, is_layout
from blocksparse_jax.packing import pack, unpack
from blocksparse_jax.plans import without_plans
from blocksparse_jax.state import SparseState, is_node, is_sparse_state


def pack_tree(
    params: PyTree, state: PyTree, layouts: PyTree, *, drop_pruned: bool = False
) -> tuple[PyTree, PyTree]:
    """Packs parameters and all moments, traces and accumulators in the optimizer state.

    A packed leaf holds kept weights only, so the methods in `state` neither mask it nor move its
    topology: training continues with the same `tx` as ordinary training of a smaller tree. To
    change masks, `unpack_tree`, update, pack again.

    The pruned weights are not in the packed values. Under hard methods they are zero, so
    `unpack_tree` restores the parameters exactly. A straight-through method (soft SUBP) trains its
    pruned weights too; packing discards them.

    Args:
      params: any pytree.
      state: an optimizer state for `params`, or None.
      layouts: `get_layouts(state)`: a BlockLayout for each leaf to pack, `Dense()` for the others.
      drop_pruned: pack also where a straight-through method keeps non-zero pruned weights, which
        are then lost.

    Returns:
      `(values, state)`.

    Raises:
      ValueError: the layouts are of another tree or another kernel; they keep other weights than
        the masks in the state; or pruned weights of a straight-through method would be lost (inside
        jit, where the values are not known, the last two are not seen).

    Example:
      >>> params = {"w": jnp.ones((1, 1, 2, 2)), "b": jnp.ones(2)}
      >>> import blocksparse_jax as bsj
      >>> kept = bsj.mask_to_layout(jnp.ones((1, 1, 2, 2), bool))
      >>> layouts = {"w": kept, "b": bsj.Dense()}
      >>> values, _ = pack_tree(params, None, layouts)
      >>> values["w"].shape, values["b"].shape
      ((1, 2, 1, 2), (2,))
    """
    packing_checks.check_masks(params, state, layouts)
    packing_checks.warn_of_other_shapes(params, state, layouts)
    if not drop_pruned:
        packing_checks.refuse_loss(params, state, layouts)
    return _convert(
        params,
        state,
        layouts,
        pack,
        lambda layout: layout.full_shape,
        lambda layout: jnp.asarray(True),
        lambda marker, layout: dataclasses.replace(
            marker, packed=jax.tree.map(jnp.copy, without_plans(layout))
        ),
    )


def unpack_tree(values: PyTree, state: PyTree, layouts: PyTree) -> tuple[PyTree, PyTree]:
    """Unpacks what `pack_tree` packed: dense parameters and optimizer state, zero where pruned.

    Args:
      values: packed parameters.
      state: the packed optimizer state, or None.
      layouts: the layouts they were packed with.

    Returns:
      `(params, state)`.

    Raises:
      ValueError: the layouts are of another tree or other values: a packed state holds those it was
        packed with (inside jit, where the values are not known, this is not seen).

    Example:
      >>> import blocksparse_jax as bsj
      >>> layouts = {"w": bsj.mask_to_layout(jnp.ones((1, 1, 2, 2), bool))}
      >>> params, _ = unpack_tree({"w": jnp.ones((1, 2, 1, 2))}, None, layouts)
      >>> params["w"].shape
      (1, 1, 2, 2)
    """
    packing_checks.check_layouts(values, state, layouts)
    return _convert(
        values,
        state,
        layouts,
        unpack,
        lambda layout: layout.full_packed_shape,
        layout_to_mask,
        lambda marker, _: dataclasses.replace(marker, packed=None),
    )


def _convert(
    params: PyTree,
    state: PyTree,
    layouts: PyTree,
    convert: Callable[[Any, BlockLayout], Any],
    shape: Callable[[BlockLayout], tuple[int, ...]],
    mask: Callable[[BlockLayout], Array],
    mark: Callable[[Any, BlockLayout], Any],
) -> tuple[PyTree, PyTree]:
    """Converts each leaf with a BlockLayout, and each state leaf that belongs to it.

    State leaves belong to a parameter by their path and its `shape(layout)`; masks become
    `mask(layout)`, and markers of layouts that are read from masks `mark(marker, layout)`.
    """
    names = [tree.path_name(path) for path, _ in jax.tree.leaves_with_path(params)]
    matched = tree.match("layouts", layouts, params, is_leaf=is_layout)
    nodes = dict(zip(names, matched, strict=True))
    for name, node in nodes.items():
        if not isinstance(node, BlockLayout | Dense):
            raise ValueError(
                f"layouts: expected a BlockLayout or Dense() at {name!r}, got "
                f"{type(node).__name__}; use get_layouts(state)"
            )
    blocks = {name: node for name, node in nodes.items() if isinstance(node, BlockLayout)}

    def state_leaf(name: str | None, value: Any) -> Any:
        if is_sparse_state(value):
            return sparse_state(value)
        if name in blocks and jnp.shape(value) == shape(blocks[name]):
            return convert(value, blocks[name])
        return value

    def sparse_state(sparse: SparseState) -> SparseState:
        def masks(path: Any, old: Any, layout: Any) -> Any:
            name = tree.path_name(path)
            is_pruned = name in blocks and not isinstance(layout, Dense)
            return mask(blocks[name]) if is_pruned else old

        def memory(path: Any, value: Any) -> Any:
            return state_leaf(tree.path_name(path), value)

        def marker(path: Any, layout: Any) -> Any:
            name = tree.path_name(path)
            is_marker = name in blocks and isinstance(layout, get_args(ShrinkingLayout))
            return mark(layout, blocks[name]) if is_marker else layout

        return sparse._replace(
            layouts=jax.tree.map_with_path(marker, sparse.layouts, is_leaf=is_node),
            masks=jax.tree.map_with_path(masks, sparse.masks, sparse.layouts),
            memory=jax.tree.map_with_path(memory, sparse.memory),
        )

    values = [
        convert(value, blocks[name]) if name in blocks else value
        for name, value in zip(names, jax.tree.leaves(params), strict=True)
    ]
    new_state = tree.map_state(state_leaf, params, state, is_leaf=is_sparse_state)
    return jax.tree.unflatten(jax.tree.structure(params), values), new_state
