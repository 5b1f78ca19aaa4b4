"""MEST: drops by weight and gradient, grows at random; softly, above the target for a while."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from blocksparse_jax import _checks, tree
from blocksparse_jax import scores as scores_
from blocksparse_jax.budgets import Budget, layer_densities
from blocksparse_jax.patterns import Kept, Pattern
from blocksparse_jax.schedules import Between, check_between
from blocksparse_jax.spec import Spec
from blocksparse_jax.transforms._base import sparse_transformation
from blocksparse_jax.transforms.exchange import (
    grow_highest,
    map_layers,
    refuse_fixed_counts,
    stay_highest,
    with_sets,
)
from blocksparse_jax.transforms.first_masks import first_masks
from blocksparse_jax.transforms.leaves import Leaf, Leaves, Step


def mest(
    sparsity: float | None,
    *,
    schedule: Between,
    pattern: Pattern | None = None,
    fraction: float = 0.2,
    gradient_weight: float = 0.1,
    soft: bool = False,
    budget: Budget = "uniform",
    where: tree.Where | None = None,
    key: Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """MEST: elastic mutation, and its soft memory bound.

    At each step of the schedule every row of the pattern with n sets of weights mutates a part f of
    them: those with the smallest `|w| + gradient_weight * |g|` go, and as many are grown at random
    among all others, the just removed ones included. Only the gradient of kept weights is read, so
    no step needs the dense one. f is `fraction` in the first three quarters of the schedule, half
    of it in the last one, and 0 at its end.

    Soft (MEST+EM&S): each step first prunes down to n, then grows `f * n` more, so that new weights
    train beside those that they may replace. The end of the schedule prunes down to n for good.

    Grown weights start at zero, and the step applies no gradient, as in `drop_and_grow`. A gradient
    that is not finite scores 0.

    Args:
      sparsity: fraction of the chosen weights to remove, in [0, 1), at the end where it is soft;
        None where the pattern fixes it.
      schedule: `between(start, end, every=...)`; the authors' code: every 5 epochs until epoch 120
        of 160, with the half from epoch 90 on.
      pattern: which sets of weights are kept together; None is `patterns.unstructured()`. The
        paper's block-based scheme is nearest to `patterns.one_by_n(4)`.
      fraction: f at first, in [0, 1]; the authors' code: 0.2, soft 0.5 at 90% sparsity and 1 at
        95%.
      gradient_weight: lambda, at least 0.
      soft: above the target between two steps.
      budget: "uniform", "erk", "er", "global" (unless soft), or a map layer name -> sparsity.
      where: predicate (name, leaf) of the sparse leaves, default conv kernels except the stem.
      key: JAX random key of masks and growth; None is `jax.random.key(0)`, the same in every run.

    Returns:
      An optax transformation that masks gradients; put it first in the chain, inside `keep_zeros`
      (`sparse(method, optimizer)` does both). While it is soft, `get_layouts(state)` reads the
      layouts of patterns that have one from the masks, outside of jit.

    Raises:
      ValueError: a bad argument; soft with HRBP's blocks, a pattern that fixes its own density, or
        the budget "global".

    Example:
      >>> import blocksparse_jax as bsj
      >>> method = mest(0.75, schedule=bsj.between(0, 4), fraction=0.5, soft=True)
      >>> params = {"w": jnp.arange(64.0).reshape(1, 1, 8, 8)}
      >>> state, counts = method.init(params), []
      >>> for _ in range(5):
      ...     _, state = method.update(params, state, params)
      ...     counts.append(int(bsj.get_masks(state)["w"].sum()))
      >>> counts
      [24, 24, 24, 20, 16]

    Reference: Yuan et al., "MEST: accurate and fast memory-economic sparse training framework on
    the edge", NeurIPS 2021. Our choice: lambda, for which we know no number; f as a part of the
    kept sets; the masks before the first step hold the target.
    """
    first = first_masks(sparsity, pattern, budget, "random", key)
    check_between(schedule)
    _checks.fraction("fraction", fraction, high_open=False)
    gradient_weight = _checks.number("gradient_weight", gradient_weight)
    if soft:
        _check_soft(first.pattern, budget)
    start, end = schedule.start, schedule.end

    def draw(chosen: dict[str, Array]) -> dict[str, Kept]:
        kept = first.at_init(chosen)
        if not soft:
            return kept
        return {
            name: Kept(kept[name].mask, first.pattern.shrinking(leaf.shape))
            for name, leaf in chosen.items()
        }

    def fraction_at(count: Array) -> Float[Array, ""]:
        last_quarter = count - start >= math.ceil(0.75 * (end - start))
        return jnp.where(count >= end, 0.0, jnp.where(last_quarter, fraction / 2, fraction))

    def redraw(step: Step, leaves: Leaves) -> dict[str, Kept]:
        part = fraction_at(step.count).astype(jnp.float32)
        step_key = jax.random.fold_in(first.key, step.count)
        counts = dict[str, Any].fromkeys(leaves)
        if soft:
            shapes = {name: leaf.mask.shape for name, leaf in leaves.items()}
            counts = first.pattern.counts(shapes, layer_densities(budget, shapes, first.sparsity))

        def mutate(layer: tuple[Leaf, Array], target: int | None) -> Kept:
            leaf, place = layer
            kept = first.pattern.kept_sets(leaf.mask, leaf.layout)
            gradient = jnp.where(jnp.isfinite(leaf.grad), leaf.grad, 0)
            score = scores_.magnitude(leaf.weights) + gradient_weight * scores_.magnitude(gradient)
            active = kept.sum(-1, keepdims=True)
            number = active if target is None else jnp.full_like(active, target)
            moved = first.pattern.moves(part, number)
            staying = number - moved if target is None else number
            stays = stay_highest(kept, first.pattern.sets(score, leaf.layout), staying)
            noise = scores_.random(jax.random.fold_in(step_key, place), leaf.mask.shape)
            new = grow_highest(stays, kept, first.pattern.sets(noise, leaf.layout), moved)
            return with_sets(first.pattern, new, leaf)

        layers = {
            name: (leaf, jnp.int32(place)) for place, (name, leaf) in enumerate(leaves.items())
        }
        return map_layers(mutate, first.pattern, layers, counts)

    def spec(chosen: dict[str, Array]) -> Spec:
        return Spec(
            "mest",
            first.density(chosen),
            schedule=schedule,
            pattern=first.pattern,
            skips_gradient=True,
            resizes=soft,
            has_layout=first.pattern.has_layout,
        )

    return sparse_transformation(spec, where=where, draw=draw, redraw=redraw)


def _check_soft(pattern: Pattern, budget: Budget) -> None:
    refuse_fixed_counts(pattern, "mest with soft=True")
    if budget == "global":
        raise ValueError(
            "budget: mest with soft=True prunes each layer to its own count, got 'global'; use "
            "'uniform', 'erk', 'er' or a map layer name -> sparsity"
        )
