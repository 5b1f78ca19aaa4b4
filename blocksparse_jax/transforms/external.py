"""Masks that the training loop sets: for methods that look at a trained network or at data."""

import functools

import optax

from blocksparse_jax import _checks, tree
from blocksparse_jax.patterns import Pattern, unstructured
from blocksparse_jax.schedules import Never, Schedule, check_schedule
from blocksparse_jax.spec import Spec
from blocksparse_jax.transforms._base import sparse_transformation
from blocksparse_jax.transforms.first_masks import keep_all

_NEVER = Never()


def external_masks(
    sparsity: float,
    *,
    schedule: Schedule = _NEVER,
    pattern: Pattern | None = None,
    where: tree.Where | None = None,
    straight_through: bool = False,
    name: str = "external",
) -> optax.GradientTransformationExtraArgs:
    """Keeps everything until the training loop sets masks with `replace_masks`.

    The part for methods that no gradient step can make alone: pruning a trained network by its
    activations, iterative pruning with rewinding. The loop computes masks where it likes, outside
    of the step, and training goes on under them.

    Args:
      sparsity: fraction of the chosen weights that the last masks remove, in [0, 1): the target
        that `summarize` shows.
      schedule: the steps at which the loop sets masks, for training loops and reports; the update
        itself changes none.
      pattern: the masks' pattern; None is `patterns.unstructured()`. Where it has a layout,
        `get_layouts(state)` reads the layouts from the masks.
      where: predicate (name, leaf) of the sparse leaves, default conv kernels except the stem.
      straight_through: pruned weights go on training: gradients pass to all weights, and
        `masked(params, state)` are the pruned weights.
      name: of the method, for reports.

    Returns:
      An optax transformation that masks gradients; put it first in the chain, inside `keep_zeros`
      (`sparse(method, optimizer)` does both).

    Raises:
      ValueError: a bad argument, or at init a chosen leaf that the pattern cannot divide.

    Example:
      >>> import blocksparse_jax as bsj, jax.numpy as jnp
      >>> params = {"w": jnp.arange(64.0).reshape(1, 1, 8, 8)}
      >>> tx = bsj.sparse(external_masks(0.5), optax.sgd(0.1))
      >>> state = tx.init(params)
      >>> state = bsj.replace_masks(state, bsj.masks_from_scores(params, 0.5))
      >>> int(bsj.get_masks(state)["w"].sum())
      32
    """
    _checks.fraction("sparsity", sparsity)
    check_schedule(schedule)
    pattern = pattern or unstructured()

    spec = Spec(
        name,
        1 - sparsity,
        schedule=schedule,
        pattern=pattern,
        straight_through=straight_through,
        resizes=True,
        has_layout=pattern.has_layout,
    )
    return sparse_transformation(spec, where=where, draw=functools.partial(keep_all, pattern))
