"""Gradual pruning: sparsity rises along a curve while the network trains."""

import jax.numpy as jnp
import optax
from jaxtyping import Array

from blocksparse_jax import _checks, budgets, schedules, tree
from blocksparse_jax.layout import Dense
from blocksparse_jax.masks import unstructured
from blocksparse_jax.scores import magnitude
from blocksparse_jax.state import Spec
from blocksparse_jax.transforms._base import (
    Drawn,
    Leaf,
    check_budget,
    sparse_transformation,
    target_density,
)


def gradual_magnitude(
    sparsity: float,
    *,
    start: int,
    end: int,
    update_every: int = 100,
    initial_sparsity: float = 0.0,
    power: float = 3.0,
    budget: budgets.Budget = "uniform",
    where: tree.Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Gradual magnitude pruning: `s_t = s_f + (s_i - s_f) * (1 - (t - start) / (end -
    start))^power`.

    Every `update_every` steps from `start`, and at `end`, each layer keeps the `round((1 - s_t) *
    size)` largest of its remaining weights; pruned weights stay pruned.

    Args:
      sparsity: final sparsity of the chosen leaves, in [0, 1).
      start: the first pruning step.
      end: the last pruning step, where the final sparsity is reached.
      update_every: steps between pruning steps.
      initial_sparsity: sparsity at `start`, at most the final sparsity.
      power: the exponent, above 0.
      budget: "uniform", "erk", "er", or a map layer name -> sparsity, for the final sparsity.
      where: predicate (name, leaf) of the sparse leaves, default conv kernels except the stem.

    Returns:
      An optax transformation that masks gradients; put it first in the chain, inside `keep_zeros`.

    Raises:
      ValueError: a bad argument.

    Example:
      >>> import blocksparse_jax as bsj
      >>> params = {"w": jnp.ones((3, 3, 8, 8))}
      >>> tx = bsj.keep_zeros(optax.chain(bsj.gradual_magnitude(0.5, start=0, end=1, update_every=1), optax.sgd(0.1)))
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     _, state = tx.update(params, state, params)
      >>> int(bsj.get_masks(state)["w"].sum())
      288

    Reference: Zhu & Gupta, "To prune, or not to prune", 2017, equation 1. At least one weight a
    layer, and the pruning step at `end` where it is no multiple of `update_every`, are ours.
    """
    _checks.fraction("sparsity", sparsity)
    _checks.fraction("initial_sparsity", initial_sparsity)
    if initial_sparsity > sparsity:
        raise ValueError(
            f"initial_sparsity: expected at most sparsity={sparsity}, got {initial_sparsity}"
        )
    _checks.positive_int("update_every", update_every)
    _checks.number("power", power, low_open=True)
    _checks.step("end", end, start=_checks.step("start", start))
    check_budget(budget)

    def due(count: Array) -> Array:
        return (
            (count >= start)
            & (count <= end)
            & (((count - start) % update_every == 0) | (count == end))
        )

    def redraw(count: Array, leaves: dict[str, Leaf]) -> Drawn:
        shapes = {name: tuple(leaf.mask.shape) for name, leaf in leaves.items()}
        drawn = {}
        for name, density in budgets.layer_densities(budget, shapes, sparsity).items():
            leaf, final = leaves[name], 1 - density
            now = schedules.cubic_sparsity(
                min(initial_sparsity, final), final, count, start, end, power
            )
            keep = jnp.maximum(1, jnp.round((1 - now) * leaf.mask.size).astype(jnp.int32))
            drawn[name] = (
                unstructured(jnp.where(leaf.mask, magnitude(leaf.weights), -1.0), keep),
                Dense(),
            )
        return drawn

    return sparse_transformation(
        lambda chosen: Spec("gradual", target_density(budget, chosen, sparsity)),
        where=where,
        draw=lambda chosen: {
            name: (jnp.ones(leaf.shape, bool), Dense()) for name, leaf in chosen.items()
        },
        redraw=redraw,
        due=due,
    )
