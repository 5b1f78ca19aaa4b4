"""The optax state of every sparse method, and what is read from it."""

import contextvars
from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from blocksparse_jax import tree
from blocksparse_jax.hidden_parts import reveal
from blocksparse_jax.layout_nodes import (
    ConsecutiveGroups,
    Dense,
    FilterGroups,
    ShrinkingLayout,
    is_layout,
)
from blocksparse_jax.masks import straight_through
from blocksparse_jax.spec import Spec, merge_specs


class SparseState(NamedTuple):
    """Optax state of a sparse method.

    Attributes:
      count: int32, updates so far.
      masks: the params' structure; bool arrays of the leaf's shape, the scalar True for a dense (or
        packed) leaf.
      layouts: the params' structure; `BlockLayout`, `Dense()`, or `ConsecutiveGroups` and
        `FilterGroups` where the kept count changes in training.
      memory: the method's own arrays, in the params' structure with a float32 scalar at each leaf
        that has none; `()` for a method without any.
      skip_gradient: bool, whether the last update changed masks instead of applying a gradient.
      stalled_updates: int32, updates of the masks that should have grown weights by their gradient
        and found it zero on every pruned weight of a layer, though not on the kept ones: the step
        gave the masked gradient where the method needs the full one.
      spec: what is fixed about the method (static).
      nonfinite_updates: int32, updates of the masks that were left out, since weights or gradients
        that decide them were not finite: the masks stayed as they were.

    Example:
      >>> SparseState._fields[:6]
      ('count', 'masks', 'layouts', 'memory', 'skip_gradient', 'stalled_updates')
      >>> SparseState._fields[6:]
      ('spec', 'nonfinite_updates')
    """

    count: jax.Array  # type: ignore[assignment]  # int32[]; optax names it so, tuple.count or not
    masks: PyTree
    layouts: PyTree
    memory: PyTree
    skip_gradient: jax.Array  # bool[]
    stalled_updates: jax.Array  # int32[]
    spec: Spec
    nonfinite_updates: jax.Array  # int32[]


LAYOUTS_STAY_WHOLE = contextvars.ContextVar("LAYOUTS_STAY_WHOLE", default=False)
"""Whether an optimizer that trains nnx variables writes layouts back whole: `bsj.nnx.Optimizer`."""


def is_sparse_state(node: Any) -> TypeGuard[SparseState]:
    """True for the state of a sparse method inside an optimizer state."""
    return isinstance(node, SparseState)


def sparse_states(state: PyTree) -> list[SparseState]:
    """The states of all sparse methods inside an optimizer state, whatever wraps them.

    Args:
      state: an optimizer state.

    Returns:
      The states, outermost first.

    Raises:
      ValueError: there is none.

    Example:
      >>> sparse_states(optax.sgd(0.1).init({"w": jnp.ones(2)}))  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      ...
      ValueError: state: expected the state of a chain that holds a sparse method ...
    """
    nodes = jax.tree.leaves(state, is_leaf=is_sparse_state)
    states = [node for node in nodes if is_sparse_state(node)]
    if not states:
        kind = type(state[0] if type(state) is tuple and state else state).__name__
        hint = ""
        if any(map(_was_sparse_state, jax.tree.leaves(state, is_leaf=_was_sparse_state))):
            hint = (
                ", but dicts in its place, as a checkpoint gives that is restored without a "
                "target; restore it into tx.init(params)"
            )
        raise ValueError(
            "state: expected the state of a chain that holds a sparse method (hrbp_prune, rigl, "
            f"...), found none in {kind}{hint}"
        )
    return states


def _was_sparse_state(node: Any) -> bool:
    """True for the dict that a checkpoint makes of a `SparseState`."""
    return isinstance(node, dict) and {"count", "masks", "layouts"} <= node.keys()


def get_spec(state: PyTree) -> Spec:
    """What the sparse method in an optimizer state publishes about itself.

    Args:
      state: the state of a transformation that holds a sparse method, under any wrappers.

    Returns:
      Its `Spec`: `changes(step)` and `dense_gradient(step)` are Python bools, `straight_through`,
      `resizes` and `has_layout` are fixed. Of several methods: what any of them does.

    Raises:
      ValueError: there is no sparse method in the state.

    Example:
      >>> import blocksparse_jax as bsj
      >>> tx = bsj.sparse(bsj.rigl(0.5, until=1000), optax.sgd(0.1))
      >>> spec = get_spec(tx.init({"w": jnp.ones((3, 3, 8, 8))}))
      >>> spec.changes(100), spec.dense_gradient(100), spec.changes(101), spec.has_layout
      (True, True, False, False)
    """
    return merge_specs([sparse.spec for sparse in sparse_states(state)])


def get_masks(state: PyTree, params: PyTree | None = None) -> PyTree:
    """The masks in an optimizer state.

    Args:
      state: the state of a transformation that holds a sparse method, under any wrappers.
      params: the parameters, where `optax.multi_transform` got labels for whole subtrees: without
        them, a subtree that it hides from the method comes back as one True where no moments of
        another transformation show what it consists of. The functions here take either.

    Returns:
      A tree of the params' structure: bool masks of the leaves' shapes, and the scalar True for
      dense leaves (it broadcasts, so `jax.tree.map(jnp.multiply, params, masks)` works in either
      order). Where several methods share a leaf: what all of them keep.

    Raises:
      ValueError: there is no sparse method in the state, or it is of other params.

    Example:
      >>> import blocksparse_jax as bsj
      >>> state = bsj.rigl(0.5, until=10).init({"w": jnp.ones((3, 3, 8, 8)), "b": jnp.ones(8)})
      >>> int(bsj.get_masks(state)["w"].sum()), bool(bsj.get_masks(state)["b"])
      (288, True)
    """
    merged = _merge([s.masks for s in sparse_states(state)], _both)
    masks = _own_arrays(reveal(merged, state, jnp.asarray(True), is_sparse_state))
    if params is None:
        return masks
    return jax.tree.unflatten(jax.tree.structure(params), tree.match("state", masks, params))


def get_layouts(state: PyTree) -> PyTree:
    """The block layouts in an optimizer state.

    Hand them to `conv`, to a layer's `layouts` collection or to `pack_tree`. A method whose kept
    count changes in training (`subp`, `gradual`) keeps masks only; its layouts are read from them
    here, outside of jit. Give them to the jitted step as an argument: it compiles once for each
    kept count.

    Args:
      state: the state of a transformation that holds a sparse method, under any wrappers.

    Returns:
      A tree of the params' structure: a `BlockLayout`, or `Dense()` for leaves that are dense or
      whose pattern has no layout.

    Raises:
      ValueError: there is no sparse method in the state, layouts must be read from masks that are
        traced, or `flax.nnx.Optimizer` has taken the layouts apart
        (`bsj.nnx.Optimizer` keeps them).

    Example:
      >>> import blocksparse_jax as bsj
      >>> params = {"w": jnp.ones((3, 3, 8, 8)), "b": jnp.ones(8)}
      >>> state = bsj.hrbp_prune(0.75, group_size=4, block_density=1).init(params)
      >>> layouts = bsj.get_layouts(state)
      >>> layouts["w"].packed_shape, layouts["b"]
      ((2, 2, 9, 4), Dense())
    """
    states = sparse_states(state)
    for sparse in states:
        for path, node in jax.tree.leaves_with_path(sparse.layouts, is_leaf=is_node):
            if not is_node(node):
                name = tree.path_name(path)
                raise ValueError(
                    f"state: expected a layout at {name!r}, got its arrays; flax.nnx.Optimizer did "
                    f"that, use bsj.nnx.Optimizer"
                )
    resolved = [jax.tree.map(_resolve, s.layouts, s.masks, is_leaf=is_node) for s in states]
    merged = _merge(resolved, lambda a, b: b if isinstance(a, Dense) else a)
    return _own_arrays(reveal(merged, state, Dense(), is_sparse_state))


def replace_masks(state: PyTree, masks: PyTree) -> PyTree:
    """Sets the masks of an `external_masks` method, or of another whose layouts follow its masks.

    Parameters and moments stay as they are: zero the pruned weights with `apply_masks`;
    `keep_zeros` resets their moments in the next update.

    Args:
      state: the state of a transformation that holds one sparse method, such as `external_masks`.
      masks: a tree of the params' structure; bool arrays for the leaves that the method prunes,
        the scalar True (or anything) for the others.

    Returns:
      The state with these masks; the layouts follow them.

    Raises:
      ValueError: the method draws its own masks, or a mask has another shape or dtype.

    Example:
      >>> import blocksparse_jax as bsj
      >>> params = {"w": jnp.ones((1, 1, 8, 8))}
      >>> state = bsj.external_masks(0.5).init(params)
      >>> state = replace_masks(state, {"w": jnp.eye(8, dtype=bool)[None, None]})
      >>> int(bsj.get_masks(state)["w"].sum())
      8
    """
    states = sparse_states(state)
    if len(states) > 1 or any(
        not isinstance(node, Dense | ConsecutiveGroups | FilterGroups | optax.MaskedNode)
        for node in jax.tree.leaves(states[0].layouts, is_leaf=is_node)
    ):
        raise ValueError(
            f"state: replace_masks sets the masks of one external_masks method, and "
            f"{get_spec(state).method!r} draws its own"
        )

    def of_method(sparse: SparseState) -> SparseState:
        old = jax.tree.leaves_with_path(sparse.masks, is_leaf=is_node)
        found = tree.match("masks", masks, sparse.masks, is_leaf=is_node)
        new = [_checked_mask(tree.path_name(path), a, b) for (path, a), b in zip(old, found)]
        structure = jax.tree.structure(sparse.masks, is_leaf=is_node)
        return sparse._replace(masks=jax.tree.unflatten(structure, new))

    def replaced(node: Any) -> Any:
        return of_method(node) if is_sparse_state(node) else node

    return jax.tree.map(replaced, state, is_leaf=is_sparse_state)


def _checked_mask(name: str, old: Any, new: Any) -> Any:
    """The new mask of a leaf; the old one where the method prunes nothing."""
    if isinstance(old, optax.MaskedNode) or not jnp.ndim(old):
        return old
    if jnp.shape(new) != old.shape or not jnp.issubdtype(jnp.result_type(new), bool):
        raise ValueError(
            f"masks: expected a bool mask of shape {old.shape} at {name!r}, got "
            f"{jnp.result_type(new)}{list(jnp.shape(new))}"
        )
    return jnp.array(new)


def masked(params: PyTree, state: PyTree) -> PyTree:
    """The weights of the forward pass: one training loop for every method.

    The identity for hard methods, whose pruned weights are zero already; for straight-through
    methods (SR-STE, soft SUBP) `w * mask` with the gradient passed to all weights.

    Args:
      params: the parameters.
      state: the optimizer state.

    Returns:
      A tree of the params' structure.

    Raises:
      ValueError: the state is of another tree.

    Example:
      >>> import blocksparse_jax as bsj
      >>> params = {"w": jnp.arange(4.0).reshape(4, 1)}
      >>> state = bsj.sr_ste(2, 4, where=lambda name, leaf: True).init(params)
      >>> bsj.masked(params, state)["w"].reshape(-1).tolist()
      [0.0, 0.0, 2.0, 3.0]

    Reference: Zhou et al., ICLR 2021; Xiang et al., "SUBP", NeurIPS 2023.
    """
    for sparse in sparse_states(state):
        nodes = tree.match("state", sparse.masks, params, is_leaf=is_node)
        if sparse.spec.straight_through:
            rule = sparse.spec.rule
            leaves = [
                w
                if isinstance(mask, optax.MaskedNode) or not jnp.ndim(mask)
                else straight_through(w, mask if rule is None else rule(w))
                for w, mask in zip(jax.tree.leaves(params), nodes, strict=True)
            ]
            params = jax.tree.unflatten(jax.tree.structure(params), leaves)
    return params


def hard_masks(state: PyTree, params: PyTree) -> list[Array]:
    """The masks at the leaves of `params`; the scalar True where pruned weights live on."""
    trees = [
        jax.tree.map(lambda m: jnp.asarray(True), s.masks) if s.spec.straight_through else s.masks
        for s in sparse_states(state)
    ]
    nodes = tree.match("state", _merge(trees, _both), params, is_leaf=is_node)
    return [jnp.asarray(True) if isinstance(node, optax.MaskedNode) else node for node in nodes]


def stands_for_params(params: Any) -> bool:
    """True for what `optax.tree_map_params` gives to `init` in place of the parameters.

    It finds what is like the parameters in a state. A method's state counts as one node that is
    not: masks stay bool, and layouts int32, whatever is done to the moments.
    """
    return isinstance(params, _PLACEHOLDER)


def _placeholder() -> type:
    seen: list[type] = []
    optax.tree_utils.tree_map_params(lambda params: seen.append(type(params)), lambda _: _, None)
    return seen[0]


_PLACEHOLDER = _placeholder()


def is_node(node: Any) -> bool:
    """True for a layout, and for what multi_transform puts where a method sees nothing."""
    return is_layout(node) or isinstance(node, optax.MaskedNode)


def _own_arrays(arrays: PyTree) -> PyTree:
    """Copies of concrete arrays, so that a step may donate the state beside them."""

    def own(array: Any) -> Any:
        is_concrete = isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer)
        return jax.device_put(array, may_alias=False) if is_concrete else array

    return jax.tree.map(own, arrays)


def _both(a: Array, b: Array) -> Array:
    """The masks' intersection, without broadcasting two scalars of dense leaves into arrays."""
    return a & b if jnp.ndim(a) and jnp.ndim(b) else (a if jnp.ndim(a) else b)


def _resolve(layout: Any, mask: Any) -> Any:
    """The layout of a mask whose kept count changes in training; other layouts as they are."""
    if not isinstance(layout, get_args(ShrinkingLayout)):
        return layout
    if layout.packed is not None:
        return layout.packed
    if not jnp.ndim(mask):
        raise ValueError(
            "state: packed without its layouts, and this method's are read from its masks: use "
            "those given to pack_tree, or unpack_tree"
        )
    if isinstance(mask, jax.core.Tracer):
        raise ValueError(
            "state: this method's kept count changes, so get_layouts reads it from the masks: call "
            "it outside of jit, pass them in"
        )
    return layout.read(mask)


def _merge(trees: list[PyTree], combine: Callable[[Any, Any], Any]) -> PyTree:
    """One tree from those of several methods.

    `optax.MaskedNode` marks leaves that a method does not see (multi_transform), and in the merged
    tree those that none sees.
    """

    def two(path: Any, a: Any, b: Any) -> Any:
        if isinstance(a, optax.MaskedNode) or isinstance(b, optax.MaskedNode):
            return b if isinstance(a, optax.MaskedNode) else a
        return combine(a, b)

    merged = trees[0]
    for other in trees[1:]:
        nodes = jax.tree.leaves_with_path(other, is_leaf=is_node)
        # leaves, or whole subtrees
        hidden = {path for path, node in nodes if isinstance(node, optax.MaskedNode)}

        def stop(path: Any, node: Any, hidden: set = hidden) -> bool:
            return path in hidden or is_node(node)

        merged = jax.tree_util.tree_map_with_path(
            two, merged, other, is_leaf=stop, is_leaf_takes_path=True
        )
    return merged
