"""Masks: bool arrays of kept weights, from scores, and what they do to the weights."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from blocksparse_jax import patterns, run_once, tree
from blocksparse_jax.alike import map_alike
from blocksparse_jax.budgets import Budget, check_budget, layer_densities
from blocksparse_jax.layout_nodes import Dense
from blocksparse_jax.patterns import Kept, Pattern, unstructured
from blocksparse_jax.patterns._base import check_static


def masks_from_scores(
    scores: PyTree,
    sparsity: float | None,
    *,
    pattern: Pattern | None = None,
    budget: Budget = "uniform",
    where: tree.Where | None = None,
) -> PyTree:
    """Keeps the sets of weights with the highest scores.

    Args:
      scores: a tree of the params' structure with a score for each weight, higher = keep; the
        params themselves would do after `jax.tree.map(jnp.abs, params)`.
      sparsity: fraction of the chosen weights to remove, in [0, 1); None where the pattern fixes
        it (`patterns.n_of_m`).
      pattern: which sets of weights are kept together; None is `patterns.unstructured()`.
      budget: how the layers share the density: "uniform", "erk", "er", "global" (one threshold
        through all layers, each of which keeps at least one set of weights in a row) or a map layer
        name -> sparsity, which a pattern that fixes the sparsity does not take.
      where: predicate (name, leaf) of the sparse leaves, default conv kernels except the stem.

    Returns:
      A tree of the same structure: bool masks, and the scalar True for the other leaves. Give it to
      `fixed_masks` or `apply_masks`.

    Raises:
      ValueError: a bad argument, or a chosen leaf that the pattern cannot divide, by name.

    Example:
      >>> scores = {"conv": jnp.arange(576.0).reshape(3, 3, 8, 8), "bias": jnp.ones(8)}
      >>> masks = masks_from_scores(scores, 0.75)
      >>> int(masks["conv"].sum()), bool(masks["bias"])
      (144, True)
    """
    pattern = check_pattern(pattern, budget)
    chosen = tree.choose(where, scores, label="scores")
    kept = draw(pattern, chosen, pattern.sparsity(sparsity), budget, label="scores")
    masks = {name: layer.mask for name, layer in kept.items()}
    return per_leaf(scores, masks, jnp.asarray(True))


def layouts_from_scores(
    scores: PyTree,
    sparsity: float | None,
    *,
    pattern: Pattern,
    budget: Budget = "uniform",
    where: tree.Where | None = None,
) -> PyTree:
    """Keeps the blocks of weights with the highest scores, as layouts.

    Args:
      scores: as in `masks_from_scores`.
      sparsity: as in `masks_from_scores`.
      pattern: one that has a layout: `patterns.block`, `one_by_n` or `channel("input")`.
      budget: as in `masks_from_scores`; "global" only outside of jit, where it reads the counts,
        which are shapes, off the scores.
      where: as in `masks_from_scores`.

    Returns:
      A tree of the same structure: `BlockLayout`, and `Dense()` for the other leaves. Give it to
      `fixed_masks(layouts=...)`, `conv` or `pack_tree`.

    Raises:
      ValueError: a bad argument, a pattern without a layout, a chosen leaf that the pattern cannot
        divide, by name, or "global" with traced scores.

    Example:
      >>> from blocksparse_jax import patterns
      >>> scores = {"conv": jnp.ones((3, 3, 64, 64)), "bias": jnp.ones(64)}
      >>> layouts = layouts_from_scores(scores, 0.9, pattern=patterns.block(group_size=32))
      >>> layouts["conv"].packed_shape, layouts["bias"]
      ((2, 19, 3, 32), Dense())
    """
    pattern = check_pattern(pattern, budget)
    if not pattern.has_layout:
        raise ValueError(
            f"pattern: {pattern} has no block layout, expected patterns.block(...), "
            "patterns.one_by_n(...) or patterns.channel('input'); masks_from_scores takes any"
        )
    chosen = tree.choose(where, scores, label="scores")
    removed = pattern.sparsity(sparsity)
    kept = draw(pattern, chosen, removed, budget, label="scores", with_layouts=True)
    return per_leaf(scores, {name: layer.layout for name, layer in kept.items()}, Dense())


def check_pattern(pattern: Any, budget: Any) -> Pattern:
    """The pattern, `unstructured()` for None; ValueError unless it is one that takes the budget."""
    pattern = unstructured() if pattern is None else pattern
    if not isinstance(pattern, Pattern):
        name = pattern if isinstance(pattern, str) else getattr(pattern, "__name__", "")
        call = (
            f"patterns.{name}(...)" if hasattr(patterns, str(name)) else "patterns.unstructured()"
        )
        raise ValueError(f"pattern: expected a pattern such as {call}, got {pattern!r}")
    check_budget(budget)
    if pattern.density is not None and isinstance(budget, Mapping):
        raise ValueError(
            f"budget: {pattern} fixes the sparsity of every layer, so a map {dict(budget)} to "
            "other sparsities has no effect; use 'uniform'"
        )
    return pattern


def draw(
    pattern: Pattern,
    scores: dict[str, Float[Array, "..."]],
    sparsity: float,
    budget: Budget,
    *,
    label: str = "params",
    with_layouts: bool = False,
) -> dict[str, Kept]:
    """The masks, and the layouts of a pattern that has them, with the highest scores.

    Args:
      pattern: which sets of weights are kept together.
      scores: by layer name, a score for each weight, higher = keep.
      sparsity: fraction of the weights to remove.
      budget: "uniform", "erk", "er", "global", or a map layer name -> sparsity.
      label: names the leaves in errors.
      with_layouts: refuses traced counts where the pattern has a layout, whose shape they are.

    Returns:
      `Kept(mask, layout)` by layer name.
    """
    pattern.check_leaves(scores, label)
    if budget == "global":
        counts = pattern.global_counts(scores, 1 - sparsity)
        if with_layouts and pattern.has_layout:
            check_static(counts, pattern.noun)
    else:
        shapes = tree.shapes(scores)
        counts = pattern.counts(shapes, layer_densities(budget, shapes, sparsity))
    if any(isinstance(count, jax.core.Tracer) for count in jax.tree.leaves(counts)):
        return {name: pattern.draw(leaf, counts[name]) for name, leaf in scores.items()}
    together = pattern.draw_together(scores, counts)
    if together is not None:
        return together
    if any(isinstance(leaf, jax.core.Tracer) for leaf in scores.values()):
        return map_alike(pattern.draw, scores, counts)
    # Only patterns that compare by their values can be looked up among compiled programs.
    draw_one = _compiled_draw if "__hash__" in vars(type(pattern)) else _draw
    if draw_one is _compiled_draw and run_once.is_traced(()):
        draw_one = _traced_draw  # constants under a transformation
    return {name: draw_one(pattern, leaf, counts[name]) for name, leaf in scores.items()}


def _draw(pattern: Pattern, scores: Float[Array, "..."], count: Any) -> Kept:
    """What is kept of one layer."""
    return pattern.draw(scores, count)


_traced_draw = jax.jit(_draw, static_argnums=(0, 2))
_compiled_draw = jax.jit(_draw, static_argnums=(0, 2), compiler_options=run_once.OPTIONS)
"""One program for all layers of one shape and count."""


def apply_masks(params: PyTree, masks: PyTree) -> PyTree:
    """Sets the pruned weights to zero.

    Args:
      params: any pytree.
      masks: a tree of the same structure (`get_masks(state)`); the scalar True of a dense leaf
        keeps it all.

    Returns:
      `where(mask, param, 0)` leaf by leaf.

    Raises:
      ValueError: the masks are of another tree or of another shape, or not bool.

    Example:
      >>> params, masks = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([True, False])}
      >>> apply_masks(params, masks)["w"].tolist()
      [1.0, 0.0]
    """
    try:
        nodes = tree.match("masks", masks, params)
    except ValueError as error:
        raise ValueError(f"{error} Of an optimizer state give get_masks(state)") from None
    leaves = jax.tree.leaves_with_path(params)
    for (path, leaf), mask in zip(leaves, nodes, strict=True):
        is_bool = jnp.asarray(mask).dtype == bool
        if not is_bool or jnp.shape(mask) not in ((), jnp.shape(leaf)):
            raise ValueError(
                f"masks: expected a bool array of shape {jnp.shape(leaf)} (or the scalar True) at "
                f"{tree.path_name(path)!r}, got {jnp.asarray(mask).dtype}{list(jnp.shape(mask))}; "
                "of an optimizer state give get_masks(state)"
            )
    kept = [jnp.where(mask, leaf, 0) for (_, leaf), mask in zip(leaves, nodes, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(params), kept)


@jax.custom_jvp
def straight_through(weights: Float[Array, "..."], mask: Bool[Array, "..."]) -> Float[Array, "..."]:
    """`where(mask, weights, 0)` whose gradient passes to all weights, pruned ones too.

    Args:
      weights: any shape.
      mask: bool of the same shape.

    Returns:
      The masked weights.

    Example:
      >>> mask = jnp.array([True, False])
      >>> jax.grad(lambda w: straight_through(w, mask).sum())(jnp.array([1.0, 2.0])).tolist()
      [1.0, 1.0]

    Reference: Bengio et al., 2013; Zhou et al., ICLR 2021, equation 4.
    """
    return jnp.where(mask, weights, 0)


@straight_through.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    return straight_through(*primals), tangents[0]


def per_leaf(structure: PyTree, values: dict[str, Any], other: Any) -> PyTree:
    """A tree of that structure with the named values, and `other` elsewhere."""
    return jax.tree.map_with_path(
        lambda path, leaf: values.get(tree.path_name(path), other), structure
    )
