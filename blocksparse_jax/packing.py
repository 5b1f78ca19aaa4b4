"""Packing: dense arrays to packed values and back, for one kernel or a whole training state."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from blocksparse_jax import layout as layouts_
from blocksparse_jax import tree
from blocksparse_jax.layout import (
    BlockLayout,
    Dense,
    ShrinkingLayout,
    block_index,
    is_layout,
    layout_to_mask,
)
from blocksparse_jax.origins import note, noted
from blocksparse_jax.plans import without_plans
from blocksparse_jax.state import SparseState, is_node, is_sparse_state


def pack(
    kernel: Float[Array, "..."], layout: BlockLayout
) -> Float[Array, "... groups kept kept_taps group_size"]:
    """Gathers the kept weights of a conv kernel.

    `values[g, k, t, i] = kernel[tap taps[g, t], channels[g, k], filters[g, i]]`.

    Args:
      kernel: a conv kernel, a dense kernel, or stacked kernels.
      layout: its layout, stacked alike.

    Returns:
      Packed values `[groups, kept, kept_taps, group_size]` behind the leading axes of a stack, of
      the kernel's dtype.

    Raises:
      ValueError: the layout is of another kernel.

    Example:
      >>> layout = layouts_.mask_to_layout(jnp.ones((1, 1, 2, 2), bool))
      >>> pack(jnp.arange(4.0).reshape(1, 1, 2, 2), layout).shape
      (1, 2, 1, 2)
    """
    if jnp.shape(kernel) != layout.full_shape:
        raise ValueError(
            f"kernel: expected shape {layout.full_shape} of the layout, got {jnp.shape(kernel)}; "
            f"was the layout made for another layer?"
        )
    values = _gathered(jnp.asarray(kernel), layout)
    note(values, layout=_arrays(layout))
    return values


def unpack(
    values: Float[Array, "... groups kept kept_taps group_size"], layout: BlockLayout
) -> Float[Array, "..."]:
    """Scatters packed values into a conv kernel that is zero elsewhere.

    `unpack(pack(w)) == where(mask, w, 0)`.

    Args:
      values: packed values, or a stack.
      layout: their layout, stacked alike.

    Returns:
      A conv kernel `[kh, kw, cin, cout]`, or what the layout is of, in the values' dtype.

    Raises:
      ValueError: the layout is of other values, as far as that is known.

    Example:
      >>> layout = layouts_.mask_to_layout(jnp.ones((1, 1, 2, 2), bool))
      >>> unpack(jnp.ones((1, 2, 1, 2)), layout).shape
      (1, 1, 2, 2)
    """
    if jnp.shape(values) != layout.full_packed_shape:
        raise ValueError(
            f"values: expected packed shape (groups, kept, kept_taps, group_size) = "
            f"{layout.full_packed_shape} of the layout, got {jnp.shape(values)}"
        )
    refuse_foreign_values("values", values, layout)
    return _scattered(jnp.asarray(values), layout)


def refuse_foreign_values(name: str, values: Array, layout: BlockLayout) -> None:
    """ValueError where packed values are known to be of another layout of equal shapes.

    That is known of the very arrays that `pack` and `pack_tree` return outside of jit.
    """
    own = noted(values, "layout")
    if own is not None and not all(map(_equal, own, _arrays(layout))):
        raise ValueError(
            f"{name}: these packed values are not of this layout, but of one of another seed, "
            "model or step; use the layouts that they were packed with"
        )


def _arrays(layout: BlockLayout) -> tuple[Array, Array, Array]:
    return layout.filters, layout.channels, layout.taps


# One program each outside of jit, rather than one for every operation.
@functools.partial(jax.jit, inline=True)
def _gathered(kernel: Array, layout: BlockLayout) -> Array:
    kh, kw, cin, cout = layout.kernels.conv_shape

    def gather(kernel: Array, layout: BlockLayout) -> Array:
        return (
            kernel.reshape(kh * kw, cin, cout)
            .at[block_index(layout)]
            .get(mode="promise_in_bounds", unique_indices=True)
        )

    return layout.kernels.each(gather)(kernel, layout)


@functools.partial(jax.jit, inline=True)
def _scattered(values: Array, layout: BlockLayout) -> Array:
    kh, kw, cin, cout = layout.kernels.conv_shape

    def scatter(values: Array, layout: BlockLayout) -> Array:
        flat = jnp.zeros((kh * kw, cin, cout), values.dtype)
        index = block_index(layout)
        return flat.at[index].set(values, mode="promise_in_bounds", unique_indices=True)

    return layout.kernels.each(scatter)(values, layout).reshape(layout.full_shape)


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
      >>> kept = layouts_.mask_to_layout(jnp.ones((1, 1, 2, 2), bool))
      >>> layouts = {"w": kept, "b": layouts_.Dense()}
      >>> values, _ = pack_tree(params, None, layouts)
      >>> values["w"].shape, values["b"].shape
      ((1, 2, 1, 2), (2,))
    """
    _check_masks(params, state, layouts)
    _warn_of_other_shapes(params, state, layouts)
    if not drop_pruned:
        _refuse_loss(params, state, layouts)
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
      >>> layouts = {"w": layouts_.mask_to_layout(jnp.ones((1, 1, 2, 2), bool))}
      >>> params, _ = unpack_tree({"w": jnp.ones((1, 2, 1, 2))}, None, layouts)
      >>> params["w"].shape
      (1, 1, 2, 2)
    """
    _check_layouts(values, state, layouts)
    return _convert(
        values,
        state,
        layouts,
        unpack,
        lambda layout: layout.full_packed_shape,
        layouts_.layout_to_mask,
        lambda marker, _: dataclasses.replace(marker, packed=None),
    )


def _check_masks(params: PyTree, state: PyTree, layouts: PyTree) -> None:
    """ValueError where known masks in a state are not those of the layouts to pack with."""
    for name, layout, (mask, own) in _beside_layouts(params, state, layouts):
        is_packable = not isinstance(own, Dense | optax.MaskedNode)
        if is_packable and jnp.shape(mask) == layout.full_shape and not _true(_keeps(layout, mask)):
            _refuse_foreign(name)


def _check_layouts(values: PyTree, state: PyTree, layouts: PyTree) -> None:
    """ValueError where the layouts are not those that a packed state holds."""
    for name, layout, (_, own) in _beside_layouts(values, state, layouts):
        packed = own if isinstance(own, BlockLayout) else getattr(own, "packed", None)
        if packed is not None and not _is_same(packed, layout):
            _refuse_foreign(name)


def _warn_of_other_shapes(params: PyTree, state: PyTree, layouts: PyTree) -> None:
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
    return one.shape == other.shape and all(_equal(a, b) for a, b in pairs)


def _equal(a: Array, b: Array) -> bool:
    """Whether two arrays are equal, compared on the host; True where their values are unknown."""
    if jnp.shape(a) != jnp.shape(b):
        return False
    return a is b or not (_is_known(a) and _is_known(b)) or np.array_equal(a, b)


def _is_known(array: Array) -> bool:
    """Whether an array is neither traced, nor donated, nor on the devices of other processes."""
    if isinstance(array, jax.core.Tracer):
        return False
    return not isinstance(array, jax.Array) or (
        not array.is_deleted() and array.is_fully_addressable
    )


def _true(flag: Array) -> bool:
    """A bool; True where it is traced."""
    return isinstance(flag, jax.core.Tracer) or bool(flag)


def _refuse_foreign(name: str) -> None:
    raise ValueError(
        f"layouts: the one at {name!r} is not that of the state, but of another seed, model or "
        "step; use get_layouts(state)"
    )


def _refuse_loss(params: PyTree, state: PyTree, layouts: PyTree) -> None:
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


def _nonzero_outside(mask: Array, values: Array) -> int:
    """How many values outside of a mask are not zero; 0 where they are traced."""
    count = jnp.count_nonzero(jnp.where(mask, 0, values))
    return 0 if isinstance(count, jax.core.Tracer) else int(count)


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
