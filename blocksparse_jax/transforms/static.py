"""Masks that never change: given ones, random weights (RU), random channels (RC)."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from blocksparse_jax import _checks, tree
from blocksparse_jax import scores as scores_
from blocksparse_jax.budgets import Budget, check_budget, layer_densities
from blocksparse_jax.counts import block_counts
from blocksparse_jax.kernels import Kernels, kernels
from blocksparse_jax.layout import BlockLayout, layout_to_mask
from blocksparse_jax.layout_nodes import Dense, is_layout
from blocksparse_jax.layout_of_mask import mask_to_layout
from blocksparse_jax.masks import draw, per_leaf
from blocksparse_jax.origins import note, noted
from blocksparse_jax.patterns import Kept, unstructured
from blocksparse_jax.spec import Spec
from blocksparse_jax.state import SparseState, stands_for_params
from blocksparse_jax.transforms._base import sparse_transformation


def fixed_masks(
    masks: PyTree | None = None, *, layouts: PyTree | None = None, sparsity: float | None = None
) -> optax.GradientTransformationExtraArgs:
    """Trains with given masks: static sparse training.

    Args:
      masks: a tree of the params' structure with a bool array for each sparse leaf and the scalar
        True for the others. A mask of a conv kernel that is a block pattern gets its `BlockLayout`
        by itself.
      layouts: instead of masks: a tree of the params' structure with `BlockLayout | Dense()`.
      sparsity: what was asked for when they were made, the target that `summarize` shows, in
        [0, 1); None is what `random_channel_layouts` was asked for, else what they have.

    Returns:
      An optax transformation that masks gradients; wrap the chain with `keep_zeros`.

    Raises:
      ValueError: neither or both are given, a mask is not bool, a sparsity out of range, or at init
        the tree or a shape is not that of the params.

    Example:
      >>> import blocksparse_jax as bsj
      >>> tx = bsj.fixed_masks({"w": jnp.array([True, False])})
      >>> params = {"w": jnp.ones(2)}
      >>> tx.update(params, tx.init(params), params)[0]["w"].tolist()
      [1.0, 0.0]

    Reference: static sparse training, e.g. Lee et al., "SNIP", ICLR 2019.
    """
    if (masks is None) == (layouts is None):
        number = "neither" if masks is None else "both"
        raise ValueError(f"masks: expected either masks or layouts=..., got {number}")
    if sparsity is not None:
        _checks.fraction("sparsity", sparsity)
    nodes = _sparse_nodes(masks) if layouts is None else _layout_nodes(layouts)
    if not nodes:
        raise ValueError(
            "masks: expected at least one bool array (or BlockLayout), got only dense leaves"
        )
    if any(isinstance(array, jax.core.Tracer) for array in jax.tree.leaves(list(nodes.values()))):
        raise ValueError(
            "masks: their values are read on the host, but they are traced; call fixed_masks "
            "outside of jit"
        )
    kept = {name: _kept(node) for name, node in nodes.items()}
    counts = {name: int(np.asarray(layer.mask).sum()) for name, layer in kept.items()}
    dead = [name for name, count in counts.items() if not count]
    if dead:
        warnings.warn(
            f"masks: nothing is kept at {', '.join(map(repr, dead))}: only zeros come out of such "
            "a layer",
            stacklevel=2,
        )

    asked_for = {_asked_for(node) for node in nodes.values()}
    if sparsity is None and len(asked_for) == 1:
        sparsity = asked_for.pop()

    def masks_of(chosen: dict[str, Array]) -> dict[str, Kept]:
        for name, leaf in chosen.items():
            shape = kept[name].mask.shape
            if shape != leaf.shape:
                raise ValueError(
                    f"masks: expected shape {leaf.shape} at {name!r}, got {shape}; made from "
                    "another model?"
                )
        # Copies, so that a step may donate the state.
        return {name: jax.tree.map(jnp.copy, kept[name]) for name in chosen}

    def spec(chosen: dict[str, Array]) -> Spec:
        reached = sum(counts.values()) / sum(leaf.size for leaf in chosen.values())
        return Spec(
            "fixed",
            reached if sparsity is None else 1 - sparsity,
            has_layout=any(isinstance(layer.layout, BlockLayout) for layer in kept.values()),
        )

    method = sparse_transformation(spec, where=lambda name, leaf: name in kept, draw=masks_of)

    def init(params: PyTree) -> SparseState:
        if stands_for_params(params):
            return method.init(params)
        names = [tree.path_name(path) for path, _ in jax.tree.leaves_with_path(params)]
        missing = [name for name in kept if name not in names]
        if missing:
            raise ValueError(
                f"masks: {missing[0]!r} is no leaf of params, expected names among {names[:8]}; "
                "made from another model?"
            )
        return method.init(params)

    return optax.GradientTransformationExtraArgs(init, method.update)


def _sparse_nodes(masks: PyTree) -> dict[str, Array]:
    """The masks of a tree that are no scalars, by name."""
    nodes = {}
    for path, node in jax.tree.leaves_with_path(masks):
        name = tree.path_name(path)
        _checks.boolean(f"masks[{name!r}]", jnp.result_type(node))
        if jnp.ndim(node):
            nodes[name] = node
    return nodes


def _layout_nodes(layouts: PyTree) -> dict[str, BlockLayout]:
    """The block layouts of a tree, by name."""
    nodes = {}
    for path, node in jax.tree.leaves_with_path(layouts, is_leaf=is_layout):
        name = tree.path_name(path)
        if not isinstance(node, BlockLayout | Dense):
            raise ValueError(
                f"layouts: expected a BlockLayout or Dense() at {name!r}, got {type(node).__name__}"
            )
        if isinstance(node, BlockLayout):
            nodes[name] = node
    return nodes


def _asked_for(node: Any) -> float | None:
    """The sparsity that a layout was drawn for, where that is known."""
    return noted(node.channels, "sparsity") if isinstance(node, BlockLayout) else None


def _kept(node: Any) -> Kept:
    """Mask and layout of either; `Dense()` where a mask is no uniform block pattern."""
    if isinstance(node, BlockLayout):
        return Kept(layout_to_mask(node), node)
    mask = jnp.asarray(node)
    try:
        return Kept(mask, mask_to_layout(mask))
    except ValueError:
        return Kept(mask, Dense())


def random_masks(
    key: Array,
    params: PyTree,
    sparsity: float,
    *,
    budget: Budget = "uniform",
    where: tree.Where | None = None,
) -> PyTree:
    """Draws unstructured masks at random (RU): exactly `round(density * size)` ones in each layer.

    Args:
      key: JAX random key.
      params: any pytree.
      sparsity: fraction to remove, in [0, 1).
      budget: "uniform", "erk", "er", "global", or a map layer name -> sparsity.
      where: predicate (name, leaf) of the sparse leaves, default conv kernels except the stem.

    Returns:
      Masks for `fixed_masks`.

    Raises:
      ValueError: a bad argument.

    Example:
      >>> params = {"w": jnp.ones((3, 3, 8, 8)), "b": jnp.ones(8)}
      >>> masks = random_masks(jax.random.key(0), params, 0.5)
      >>> int(masks["w"].sum()), bool(masks["b"])
      (288, True)

    Reference: random unstructured (RU) of Ma et al., "HRBP", CPAL 2024.
    """
    check_budget(budget)
    _checks.fraction("sparsity", sparsity)
    chosen = tree.choose(where, params)
    scores = scores_.make("random", chosen, None, _checks.random_key("key", key))
    kept = draw(unstructured(), scores, sparsity, budget)
    return per_leaf(params, {name: layer.mask for name, layer in kept.items()}, jnp.asarray(True))


def random_channel_layouts(
    key: Array, params: PyTree, sparsity: float, *, where: tree.Where | None = None
) -> PyTree:
    """Draws input channels at random (RC): all filters of a layer keep the same ones.

    The layout has one group that holds all filters.

    Args:
      key: JAX random key.
      params: any pytree.
      sparsity: fraction to remove, in [0, 1).
      where: predicate (name, leaf) of the sparse leaves, default conv kernels except the stem.

    Returns:
      Layouts for `fixed_masks(layouts=...)`.

    Raises:
      ValueError: a bad argument, or a chosen leaf that holds no kernels.

    Example:
      >>> params = {"w": jnp.ones((3, 3, 8, 16)), "b": jnp.ones(8)}
      >>> layouts = random_channel_layouts(jax.random.key(0), params, 0.5)
      >>> layouts["w"].packed_shape
      (1, 4, 9, 16)

    Reference: random channel (RC) of Ma et al., "HRBP", CPAL 2024; that each layer draws its own
    channels is our choice.
    """
    chosen = tree.choose(where, params)
    layers = {name: kernels(f"params[{name!r}]", leaf.shape) for name, leaf in chosen.items()}
    shapes = tree.shapes(chosen)
    densities = layer_densities("uniform", shapes, sparsity)
    single = dict.fromkeys(shapes, 1)
    counts = block_counts(shapes, densities, block_density=1.0, channel_blocks=single)
    key = _checks.random_key("key", key)
    layouts = {}
    for i, (name, of) in enumerate(layers.items()):

        def draw_one(key: Array, name: str = name, of: Kernels = of) -> BlockLayout:
            kh, kw, cin, cout = of.conv_shape
            order = jax.random.permutation(key, cin)
            channels = jnp.sort(order[: counts[name].kept]).astype(jnp.int32)
            return BlockLayout(
                filters=jnp.arange(cout, dtype=jnp.int32)[None],
                channels=channels[None],
                taps=jnp.arange(kh * kw, dtype=jnp.int32)[None, : counts[name].kept_taps],
                shape=of.shape,
            )

        leaf_key = jax.random.fold_in(key, i)
        keys = jax.random.split(leaf_key, of.stack) if of.stack else leaf_key
        layouts[name] = of.each(draw_one)(keys)
        note(layouts[name].channels, sparsity=float(sparsity))
    return per_leaf(params, layouts, Dense())
