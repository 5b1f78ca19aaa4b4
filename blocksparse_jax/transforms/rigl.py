"""Dynamic sparse training of single weights: RigL."""

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
from blocksparse_jax.transforms.static import draw_random


def rigl(
    sparsity: float,
    *,
    update_every: int = 100,
    start: int = 0,
    until: int,
    drop_fraction: float = 0.3,
    budget: budgets.Budget = "erk",
    where: tree.Where | None = None,
    key: Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """RigL: drops the smallest weights and grows the connections with the largest gradient.

    Every `update_every` steps after `start`, before `until`, each layer with n active weights drops
    `floor(f * n)`, `f = drop_fraction / 2 * (1 + cos(pi * (t - start) / (until - start)))`, keeps
    the largest `|w|` and grows as many of the largest `|g|` among all others, the just dropped ones
    included. Grown weights start at zero with fresh moments (under `keep_zeros`), and that step
    applies no gradient. Masks start at random. The gradient must be the full one, as any dense
    execution gives it; where it is zero on every pruned weight, the update raises a ValueError, or
    inside jit counts in `blind_updates`, which `summarize` shows.

    Args:
      sparsity: fraction of the chosen weights to remove, in [0, 1).
      update_every: steps between topology steps.
      start: the step from which they are counted.
      until: no topology step from here on (the paper: 0.75 of training).
      drop_fraction: the fraction at `start`, in [0, 1].
      budget: "erk", "uniform", "er", or a map layer name -> sparsity.
      where: predicate (name, leaf) of the sparse leaves, default conv kernels except the stem.
      key: JAX random key of the first masks; None is `jax.random.key(0)`, the same masks in every
        run.

    Returns:
      An optax transformation that masks gradients; put it first in the chain, inside `keep_zeros`.

    Raises:
      ValueError: a bad argument.

    Example:
      >>> import blocksparse_jax as bsj
      >>> params = {"w": jnp.ones((3, 3, 8, 8))}
      >>> tx = bsj.keep_zeros(optax.chain(bsj.rigl(0.9, until=1000), optax.sgd(0.1, momentum=0.9)))
      >>> int(bsj.get_masks(tx.init(params))["w"].sum())
      58

    Reference: Evci et al., "Rigging the lottery: making all tickets winners", ICML 2020, algorithm
    1. No topology step at `start` itself, before anything is learnt, is ours.
    """
    _checks.fraction("sparsity", sparsity)
    _checks.fraction("drop_fraction", drop_fraction, high_open=False)
    due = schedules.Periodic(_checks.positive_int("update_every", update_every), start, until)
    check_budget(budget)
    random_key = _checks.random_key("key", key)

    def draw(chosen: dict[str, Array]) -> Drawn:
        return {
            name: (mask, Dense())
            for name, mask in draw_random(random_key, chosen, sparsity, budget).items()
        }

    def redraw(count: Array, leaves: dict[str, Leaf]) -> Drawn:
        fraction = schedules.cosine_fraction(drop_fraction, count, start, until)
        return {name: (_drop_and_grow(leaf, fraction), Dense()) for name, leaf in leaves.items()}

    return sparse_transformation(
        lambda chosen: Spec(
            "rigl", target_density(budget, chosen, sparsity), skips=True, full_gradient=True
        ),
        where=where,
        draw=draw,
        redraw=redraw,
        due=due,
    )


def _drop_and_grow(leaf: Leaf, fraction: Array) -> Array:
    active = leaf.mask.sum()
    count = jnp.floor(fraction * active).astype(jnp.int32)
    stays = unstructured(jnp.where(leaf.mask, magnitude(leaf.weights), -jnp.inf), active - count)
    grows = unstructured(jnp.where(stays, -jnp.inf, magnitude(leaf.grad)), count)
    return stays | grows
