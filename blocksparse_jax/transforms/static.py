"""Masks that never change: given ones, random weights (RU), random channels (RC)."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from blocksparse_jax import _checks, budgets, layout, tree
from blocksparse_jax import masks as masks_
from blocksparse_jax import scores as scores_
from blocksparse_jax.layout import BlockLayout, Dense, is_layout
from blocksparse_jax.state import SparseState, Spec
from blocksparse_jax.transforms._base import Drawn, sparse_transformation


def fixed_masks(
    masks: PyTree | None = None, *, layouts: PyTree | None = None
) -> optax.GradientTransformationExtraArgs:
    """Trains with given masks: static sparse training.

    Args:
      masks: a tree of the params' structure with a bool array for each sparse leaf and the scalar
        True for the others. A mask of a conv kernel that is a block pattern gets its `BlockLayout`
        by itself.
      layouts: instead of masks: a tree of the params' structure with `BlockLayout | Dense()`.

    Returns:
      An optax transformation that masks gradients; wrap the chain with `keep_zeros`.

    Raises:
      ValueError: neither or both are given, a mask is not bool, or at init the tree or a shape is
        not that of the params.

    Example:
      >>> import blocksparse_jax as bsj
      >>> tx = bsj.fixed_masks({"w": jnp.array([True, False])})
      >>> params = {"w": jnp.ones(2)}
      >>> tx.update(params, tx.init(params), params)[0]["w"].tolist()
      [1.0, 0.0]

    Reference: static sparse training, e.g. Lee et al., "SNIP", ICLR 2019.
    """
    if (masks is None) == (layouts is None):
        raise ValueError(
            "masks: expected either masks or layouts=..., got "
            + ("neither" if masks is None else "both")
        )
    given: dict[str, Array | BlockLayout] = {}
    for path, node in jax.tree.leaves_with_path(
        masks if layouts is None else layouts, is_leaf=is_layout
    ):
        name = tree.path_name(path)
        if layouts is not None and not isinstance(node, BlockLayout | Dense):
            raise ValueError(
                f"layouts: expected a BlockLayout or Dense() at {name!r}, got {type(node).__name__}"
            )
        if layouts is None and jnp.result_type(node) != jnp.bool_:
            raise ValueError(
                f"masks: expected dtype bool at {name!r}, got {jnp.result_type(node)}; compare "
                f"first, e.g. mask != 0"
            )
        if isinstance(node, BlockLayout) or (not isinstance(node, Dense) and jnp.ndim(node)):
            given[name] = node
    if not given:
        raise ValueError(
            "masks: expected at least one bool array (or BlockLayout), got only dense leaves"
        )
    known = {
        name: node if isinstance(node, BlockLayout) else _layout_or_dense(node)
        for name, node in given.items()
    }

    def draw(chosen: dict[str, Array]) -> Drawn:
        drawn = {}
        for name, leaf in chosen.items():
            node = given[name]
            shape = node.shape
            if tuple(shape) != leaf.shape:
                raise ValueError(
                    f"masks: expected shape {leaf.shape} at {name!r}, got {tuple(shape)}; made "
                    f"from another model?"
                )
            drawn[name] = (
                layout.layout_to_mask(node) if isinstance(node, BlockLayout) else jnp.asarray(node),
                known[name],
            )
        return drawn

    if any(isinstance(node, jax.core.Tracer) for node in jax.tree.leaves(list(given.values()))):
        raise ValueError(
            "masks: their values are read on the host, but they are traced; call fixed_masks "
            "outside of jit"
        )
    counts = {
        name: np.prod(n.packed_shape) if isinstance(n, BlockLayout) else np.asarray(n).sum()
        for name, n in given.items()
    }
    dead, kept = [name for name, count in counts.items() if not count], sum(counts.values())
    if dead:
        warnings.warn(
            f"masks: nothing is kept at {', '.join(map(repr, dead))}: only zeros come out of such "
            f"a layer",
            stacklevel=2,
        )

    def spec(chosen: dict[str, Array]) -> Spec:
        return Spec("fixed", float(kept / sum(leaf.size for leaf in chosen.values())))

    method = sparse_transformation(spec, where=lambda name, leaf: name in given, draw=draw)

    def init(params: PyTree) -> SparseState:
        names = [tree.path_name(path) for path, _ in jax.tree.leaves_with_path(params)]
        missing = [name for name in given if name not in names]
        if missing:
            raise ValueError(
                f"masks: {missing[0]!r} is no leaf of params, expected names among {names[:8]}; "
                f"made from another model?"
            )
        return method.init(params)

    return optax.GradientTransformationExtraArgs(init, method.update)


def _layout_or_dense(mask: Array) -> BlockLayout | Dense:
    """A conv mask's layout, or Dense() where it is no uniform block pattern."""
    if isinstance(mask, jax.core.Tracer) or jnp.ndim(mask) != 4:
        return Dense()
    try:
        return layout.mask_to_layout(mask)
    except ValueError:
        return Dense()


def random_masks(
    key: Array,
    params: PyTree,
    sparsity: float,
    *,
    budget: budgets.Budget = "uniform",
    where: tree.Where | None = None,
) -> PyTree:
    """RU: unstructured masks drawn at random, with exactly `round(density * size)` ones in each
    layer.

    Args:
      key: JAX random key.
      params: any pytree.
      sparsity: fraction to remove, in [0, 1).
      budget: "uniform", "erk", "er", or a map layer name -> sparsity.
      where: predicate (name, leaf) of the sparse leaves, default conv kernels except the stem.

    Returns:
      Masks for `fixed_masks`.

    Raises:
      ValueError: a bad argument.

    Example:
      >>> masks = random_masks(jax.random.key(0), {"w": jnp.ones((3, 3, 8, 8)), "b": jnp.ones(8)}, 0.5)
      >>> int(masks["w"].sum()), bool(masks["b"])
      (288, True)

    Reference: random unstructured (RU) of Ma et al., "HRBP", CPAL 2024.
    """
    chosen = tree.choose(where, params)
    drawn = draw_random(_checks.random_key("key", key), chosen, sparsity, budget)
    return jax.tree.map_with_path(
        lambda path, leaf: drawn.get(tree.path_name(path), jnp.asarray(True)), params
    )


def draw_random(
    key: Array, chosen: dict[str, Array], sparsity: float, budget: budgets.Budget
) -> dict[str, Array]:
    """Random masks of the chosen leaves, by name: see `random_masks`."""
    shapes = {name: tuple(leaf.shape) for name, leaf in chosen.items()}
    counts = budgets.weight_counts(budgets.layer_densities(budget, shapes, sparsity), shapes)
    scores = scores_.make("random", chosen, None, key)
    return {name: masks_.unstructured(scores[name], counts[name]) for name in chosen}


def random_channel_layouts(
    key: Array, params: PyTree, sparsity: float, *, where: tree.Where | None = None
) -> PyTree:
    """RC: every filter of a layer keeps the same input channels, drawn at random: one group that
    holds all filters.

    Args:
      key: JAX random key.
      params: any pytree.
      sparsity: fraction to remove, in [0, 1).
      where: predicate (name, leaf) of the sparse leaves, default conv kernels except the stem.

    Returns:
      Layouts for `fixed_masks(layouts=...)`.

    Raises:
      ValueError: a bad argument, or a chosen leaf that is no conv kernel.

    Example:
      >>> layouts = random_channel_layouts(jax.random.key(0), {"w": jnp.ones((3, 3, 8, 16)), "b": jnp.ones(8)}, 0.5)
      >>> layouts["w"].packed_shape
      (1, 4, 9, 16)

    Reference: random channel (RC) of Ma et al., "HRBP", CPAL 2024; which channels go is drawn per
    layer (ours).
    """
    chosen = tree.choose(where, params)
    shapes = {
        name: _checks.kernel_shape(f"params[{name!r}]", leaf.shape) for name, leaf in chosen.items()
    }
    densities = budgets.layer_densities("uniform", shapes, sparsity)
    counts = budgets.block_counts(
        shapes, densities, block_density=1.0, channel_blocks=dict.fromkeys(shapes, 1)
    )
    drawn, key = {}, _checks.random_key("key", key)
    for i, (name, shape) in enumerate(shapes.items()):
        kh, kw, cin, cout = shape
        order = jax.random.permutation(jax.random.fold_in(key, i), cin)[: counts[name][0]]
        taps = jnp.arange(kh * kw, dtype=jnp.int32)[: counts[name][1]]
        drawn[name] = BlockLayout(
            jnp.arange(cout, dtype=jnp.int32)[None],
            jnp.sort(order).astype(jnp.int32)[None],
            taps[None],
            shape,
        )
    return jax.tree.map_with_path(
        lambda path, leaf: drawn.get(tree.path_name(path), Dense()), params
    )
