"""Gradual pruning: sparsity rises along a curve while the network trains."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from blocksparse_jax import _checks, schedules, tree
from blocksparse_jax.alike import flat, map_alike
from blocksparse_jax.budgets import Budget, layer_densities, target_density
from blocksparse_jax.masks import check_pattern
from blocksparse_jax.patterns import Kept, Pattern, unstructured
from blocksparse_jax.patterns.block import Block
from blocksparse_jax.schedules import Between, between, check_between
from blocksparse_jax.scores import magnitude
from blocksparse_jax.spec import Spec
from blocksparse_jax.transforms._base import sparse_transformation
from blocksparse_jax.transforms.leaves import Leaves, Step


def gradual(
    sparsity: float,
    *,
    pattern: Pattern | None = None,
    schedule: Between,
    initial_sparsity: float = 0.0,
    power: float = 3.0,
    budget: Budget = "uniform",
    where: tree.Where | None = None,
    name: str = "gradual",
) -> optax.GradientTransformationExtraArgs:
    """Prunes gradually: `s_t = s_f + (s_i - s_f) * (1 - (t - start) / (end - start))^power`.

    At each step of the schedule every row of the pattern keeps the nearest number of its remaining
    sets of weights, those with the largest summed magnitude; pruned weights stay pruned. At the
    schedule's end the counts are those of one-shot pruning. HRBP's blocks lose taps first, then
    channels; their groups of filters are found by the weights at the schedule's start.

    While the kept count changes, `get_layouts(state)` reads the layouts of patterns that have one
    from the masks, outside of jit.

    Args:
      sparsity: final sparsity of the chosen leaves, in [0, 1).
      pattern: which sets of weights are kept together; None is `patterns.unstructured()`.
      schedule: `between(start, end, every=...)`: the first pruning step, the last, where the final
        sparsity is reached, and the steps between two.
      initial_sparsity: sparsity at the start, at most the final sparsity.
      power: the exponent, above 0.
      budget: "uniform", "erk", "er", "global" (one threshold at each step), or a map layer name ->
        sparsity, for the final sparsity.
      where: predicate (name, leaf) of the sparse leaves, default conv kernels except the stem.
      name: of the method, for reports.

    Returns:
      An optax transformation that masks gradients; put it first in the chain, inside `keep_zeros`
      (`sparse(method, optimizer)` does both).

    Raises:
      ValueError: a bad argument, a pattern that fixes its own density, or "global" with HRBP's
        blocks, whose counts are shapes.

    Example:
      >>> import blocksparse_jax as bsj
      >>> params = {"w": jnp.ones((3, 3, 32, 32))}
      >>> method = gradual(
      ...     0.75, pattern=bsj.patterns.one_by_n(16), schedule=bsj.between(0, 2, every=1))
      >>> tx = bsj.sparse(method, optax.sgd(0.1))
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     _, state = tx.update(params, state, params)
      >>> bsj.get_layouts(state)["w"].packed_shape
      (2, 8, 9, 16)

    Reference: Zhu & Gupta, "To prune, or not to prune", 2017, equation 1. At least one set of
    weights in every row, the pruning step at the end where it is no multiple of the period, and
    the order taps before channels are our choice.
    """
    pattern = check_pattern(pattern, budget)
    _checks.fraction("sparsity", sparsity)
    _checks.fraction("initial_sparsity", initial_sparsity)
    if initial_sparsity > sparsity:
        raise ValueError(
            f"initial_sparsity: expected at most sparsity={sparsity}, got {initial_sparsity}"
        )
    _checks.number("power", power, low_open=True)
    check_between(schedule)
    _check_pattern(pattern, budget)

    def final(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        return pattern.counts(shapes, layer_densities(budget, shapes, sparsity))

    def sparsity_at(step: Step, last: float) -> Array:
        first = min(initial_sparsity, last)
        start, end = schedule.start, schedule.end
        return schedules.cubic_sparsity(first, last, step.count, start, end, power)

    def draw_all(chosen: dict[str, Array]) -> dict[str, Kept]:
        pattern.check_leaves(chosen)
        kept = {
            leaf_name: Kept(jnp.ones(leaf.shape, bool), pattern.shrinking(leaf.shape))
            for leaf_name, leaf in chosen.items()
        }
        if schedule.start == 0 and isinstance(pattern, Block):
            return _regroup(pattern, chosen, kept, final(tree.shapes(chosen)))
        return kept

    def redraw(step: Step, leaves: Leaves) -> dict[str, Kept]:
        scores = {leaf_name: magnitude(leaf.weights) for leaf_name, leaf in leaves.items()}
        kept = {leaf_name: Kept(leaf.mask, leaf.layout) for leaf_name, leaf in leaves.items()}
        if budget == "global":
            remaining = {n: jnp.where(kept[n].mask, s, -jnp.inf) for n, s in scores.items()}
            counts = pattern.global_counts(remaining, 1 - sparsity_at(step, sparsity))
            return {
                n: old._replace(mask=pattern.keep(scores[n], old.mask, old.layout, counts[n]))
                for n, old in kept.items()
            }
        shapes = tree.shapes(scores)
        counts = final(shapes)
        if schedule.start > 0 and isinstance(pattern, Block):
            kept = jax.lax.cond(
                step.count == schedule.start,
                lambda kept: _regroup(pattern, scores, kept, counts),
                lambda kept: kept,
                kept,
            )

        def shrink(layer: tuple[Array, Kept, Array], final_count: Any) -> Kept:
            leaf_scores, (mask, layout), density = layer
            smaller = pattern.shrink(leaf_scores, mask, layout, density, final_count)
            return Kept(smaller, layout)

        layers = {}
        for leaf_name, density in layer_densities(budget, shapes, sparsity).items():
            now = 1 - sparsity_at(step, 1 - density)
            now = jnp.where(step.count >= schedule.end, 0.0, now)  # exactly the final counts
            layers[leaf_name] = scores[leaf_name], kept[leaf_name], now
        if pattern != unstructured():
            return map_alike(shrink, layers, counts)
        # Single weights do not see the shape of their layer.
        shrunk = map_alike(shrink, flat(layers), counts)
        return {n: Kept(shrunk[n].mask.reshape(shapes[n]), kept[n].layout) for n in kept}

    def spec(chosen: dict[str, Array]) -> Spec:
        return Spec(
            name,
            target_density(budget, tree.shapes(chosen), sparsity),
            schedule=schedule,
            pattern=pattern,
            resizes=True,
            has_layout=pattern.has_layout,
        )

    return sparse_transformation(spec, where=where, draw=draw_all, redraw=redraw)


def gradual_magnitude(
    sparsity: float,
    *,
    start: int,
    end: int,
    update_every: int = 100,
    initial_sparsity: float = 0.0,
    power: float = 3.0,
    budget: Budget = "uniform",
    where: tree.Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Gradual magnitude pruning of single weights.

    The same as `gradual(sparsity, schedule=between(start, end, every=update_every))`.

    Args:
      sparsity: final sparsity of the chosen leaves, in [0, 1).
      start: the first pruning step.
      end: the last pruning step, where the final sparsity is reached.
      update_every: steps between pruning steps.
      initial_sparsity: sparsity at `start`, at most the final sparsity.
      power: the exponent, above 0.
      budget: as in `gradual`.
      where: predicate (name, leaf) of the sparse leaves, default conv kernels except the stem.

    Returns:
      An optax transformation that masks gradients; put it first in the chain, inside `keep_zeros`.

    Raises:
      ValueError: a bad argument.

    Example:
      >>> import blocksparse_jax as bsj
      >>> params = {"w": jnp.ones((3, 3, 8, 8))}
      >>> method = bsj.gradual_magnitude(0.5, start=0, end=1, update_every=1)
      >>> tx = bsj.sparse(method, optax.sgd(0.1))
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     _, state = tx.update(params, state, params)
      >>> int(bsj.get_masks(state)["w"].sum())
      288

    Reference: Zhu & Gupta, "To prune, or not to prune", 2017, equation 1.
    """
    _checks.fraction("sparsity", sparsity)
    _checks.positive_int("update_every", update_every)
    return gradual(
        sparsity,
        schedule=between(start, end, every=update_every),
        initial_sparsity=initial_sparsity,
        power=power,
        budget=budget,
        where=where,
    )


def _check_pattern(pattern: Pattern, budget: Budget) -> None:
    if pattern.density is not None:
        raise ValueError(
            f"pattern: {pattern} fixes its own density {pattern.density:g}, so there is nothing to "
            "prune gradually; use one_shot or sr_ste"
        )
    if budget == "global" and isinstance(pattern, Block):
        raise ValueError(
            "budget: 'global' changes counts by what the weights are, and the counts of HRBP's "
            "blocks are shapes; use 'uniform', 'erk' or 'er'"
        )


def _regroup(
    pattern: Block, weights: dict[str, Array], kept: dict[str, Kept], counts: dict[str, Any]
) -> dict[str, Kept]:
    """The same masks in the groups that the weights suggest."""
    return {
        name: layer._replace(layout=pattern.groups(magnitude(weights[name]), counts[name]))
        for name, layer in kept.items()
    }
