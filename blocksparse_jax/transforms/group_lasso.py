"""Group lasso: sets of weights that a penalty on their norms drives to zero, to be pruned."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from blocksparse_jax import _checks, tree
from blocksparse_jax.budgets import Budget, layer_densities, target_density
from blocksparse_jax.layout_nodes import Dense
from blocksparse_jax.masks import check_pattern
from blocksparse_jax.patterns import Kept, Pattern, channel
from blocksparse_jax.patterns.block import Block
from blocksparse_jax.schedules import Between, check_between
from blocksparse_jax.selection import highest_in_rows
from blocksparse_jax.spec import Spec
from blocksparse_jax.transforms._base import sparse_transformation
from blocksparse_jax.transforms.first_masks import keep_all
from blocksparse_jax.transforms.leaves import Leaf, Leaves, Step

_EPSILON = 1e-8  # under the root: a set of zeros has a gradient


def group_lasso(
    sparsity: float,
    *,
    pattern: Pattern | None = None,
    schedule: Between,
    strength: float = 5e-4,
    threshold: float = 1e-4,
    also: Sequence[Pattern] = (),
    depth: tree.Where | None = None,
    truncated: bool = False,
    budget: Budget = "uniform",
    where: tree.Where | None = None,
    name: str = "group-lasso",
) -> optax.GradientTransformationExtraArgs:
    """Structured sparsity learning: penalises the norms of sets of weights, prunes those near zero.

    The loss gets `strength * sum over sets of sqrt(|w_set|^2 + 1e-8)`, by its gradient. At the
    steps of the schedule the sets whose root mean square is below the threshold are pruned, of the
    smallest norms first and no more than the sparsity asks for; at its end the sparsity is reached
    exactly. Pruned weights stay pruned.

    Args:
      sparsity: final sparsity of the chosen leaves, in [0, 1).
      pattern: which sets of weights are penalised and pruned; None is `patterns.channel("input")`,
        which has a layout. `patterns.channel("output")` means filters and `patterns.channel_tap()`
        filter shapes. Not `patterns.block`.
      schedule: `between(start, end, every=...)`: the pruning steps.
      strength: lambda, of the penalty.
      threshold: root mean square of a set's weights below which it is pruned; 0 prunes at the
        schedule's end alone.
      also: patterns whose sets are penalised too, with the same strength, and not pruned: filters
        beside channels.
      depth: predicate (name, leaf) of the leaves that may go as a whole, those in a residual
        branch. The norm of all their weights is penalised too, with the same strength, and at the
        steps of the schedule such a leaf is pruned where the root mean square of its kept weights
        is below the threshold: it ends with less than the sparsity leaves.
      truncated: penalise only the sets that are to go: in each layer all but the `1 - sparsity` of
        the largest norms; `also` and `depth` are penalised in full.
      budget: "uniform", "erk", "er", "global", or a map layer name -> sparsity.
      where: predicate (name, leaf) of the sparse leaves, default conv kernels except the stem.
      name: of the method, for reports.

    Returns:
      An optax transformation that masks gradients; put it first in the chain, inside `keep_zeros`
      (`sparse(method, optimizer)` does both).

    Raises:
      ValueError: a bad argument, a pattern that fixes its own density or one of blocks, or at init
        a chosen leaf that a pattern cannot divide.

    Example:
      >>> import blocksparse_jax as bsj
      >>> params = {"w": jnp.ones((1, 1, 8, 4)).at[:, :, 0].set(0.01)}
      >>> tx = group_lasso(0.5, schedule=bsj.between(0, 9), strength=0.1, threshold=0.1)
      >>> updates, state = tx.update({"w": jnp.zeros((1, 1, 8, 4))}, tx.init(params), params)
      >>> round(float(updates["w"][0, 0, 1, 0]), 3), bsj.get_masks(state)["w"][0, 0, :, 0].tolist()
      (0.05, [False, True, True, True, True, True, True, True])

    Reference: Wen et al., "Learning structured sparsity in deep neural networks", NIPS 2016,
    equations 3 to 5, and a layer as a group (depth). The sparsity that the schedule's end enforces,
    the default strength and the threshold as a root mean square are our choice.
    """
    pattern = check_pattern(channel("input") if pattern is None else pattern, budget)
    penalised = tuple(check_pattern(other, "uniform") for other in also)
    _check_patterns(pattern, penalised)
    _checks.fraction("sparsity", sparsity)
    check_between(schedule)
    strength = _checks.number("strength", strength)
    threshold = _checks.number("threshold", threshold)

    def draw(chosen: dict[str, Array]) -> dict[str, Kept]:
        if depth is not None and not any(is_deep(*named) for named in chosen.items()):
            raise ValueError(
                f"depth: chooses none of the sparse leaves {list(chosen)[:8]}; name kernels of "
                "residual branches, or leave it out"
            )
        for each in penalised:
            each.check_leaves(chosen)
        return keep_all(pattern, chosen)

    def is_deep(leaf_name: str, leaf: Array) -> bool:
        return depth is not None and bool(depth(leaf_name, leaf))

    def penalty(leaf_name: str, leaf: Leaf) -> Array:
        def norms(weights: Float[Array, "..."]) -> Array:
            own = _norms(pattern, weights)
            if truncated:
                own = jnp.where(highest_in_rows(own, final_count(leaf)), 0, own)
            total = own.sum() + sum(_norms(other, weights).sum() for other in penalised)
            if is_deep(leaf_name, leaf.weights):
                total += jnp.sqrt(jnp.square(weights).sum() + _EPSILON)
            return total

        return strength * jax.grad(norms)(leaf.weights.astype(jnp.float32))

    def final_count(leaf: Leaf) -> int:
        return max(1, round((1 - sparsity) * pattern.units(leaf.weights.shape).sets))

    def redraw(step: Step, leaves: Leaves) -> dict[str, Kept]:
        squares = {
            leaf_name: jnp.where(leaf.mask, jnp.square(leaf.weights.astype(jnp.float32)), 0)
            for leaf_name, leaf in leaves.items()
        }
        kept = {}
        for leaf_name, count in _final_counts(pattern, budget, squares, sparsity).items():
            leaf = leaves[leaf_name]
            unit = pattern.units(leaf.mask.shape)
            mean = pattern.sets(squares[leaf_name], leaf.layout) / unit.weights
            above = (mean > threshold**2).sum(-1).max()
            now = jnp.where(step.count >= schedule.end, count, jnp.maximum(count, above))
            mask = pattern.keep(squares[leaf_name], leaf.mask, leaf.layout, now)
            if is_deep(leaf_name, leaf.weights):
                square = squares[leaf_name].sum(where=mask)
                active = mask.sum().astype(jnp.float32)
                mask &= square > jnp.float32(threshold) ** 2 * active
            kept[leaf_name] = Kept(mask, leaf.layout)
        return kept

    def spec(chosen: dict[str, Array]) -> Spec:
        return Spec(
            name,
            target_density(budget, tree.shapes(chosen), sparsity),
            schedule=schedule,
            pattern=pattern,
            resizes=True,
            has_layout=pattern.has_layout,
        )

    return sparse_transformation(spec, where=where, draw=draw, redraw=redraw, penalty=penalty)


def _norms(pattern: Pattern, weights: Float[Array, "..."]) -> Float[Array, "rows sets"]:
    """The L2 norm of each set."""
    return jnp.sqrt(pattern.sets(jnp.square(weights), Dense()) + _EPSILON)


def _final_counts(
    pattern: Pattern, budget: Budget, squares: dict[str, Array], sparsity: float
) -> dict[str, Any]:
    """The sets of a row that each layer keeps in the end."""
    if budget == "global":
        return pattern.global_counts(squares, 1 - sparsity)
    shapes = tree.shapes(squares)
    return pattern.counts(shapes, layer_densities(budget, shapes, sparsity))


def _check_patterns(pattern: Pattern, also: Sequence[Pattern]) -> None:
    for label, one in [("pattern", pattern), *(("also", other) for other in also)]:
        if one.density is not None or isinstance(one, Block):
            raise ValueError(
                f"{label}: expected sets of weights that a sparsity leaves, such as "
                f"patterns.channel('input'), got {one}"
            )
