"""HRBP and HRBP++: hardware-friendly regrouped block patterns, static and dynamic."""

from typing import Any

import optax
from jaxtyping import Array, PyTree

from blocksparse_jax import _checks, tree
from blocksparse_jax import scores as scores_
from blocksparse_jax.budgets import Budget
from blocksparse_jax.patterns import block
from blocksparse_jax.schedules import Schedule, check_schedule
from blocksparse_jax.transforms.drop_and_grow import drop_and_grow
from blocksparse_jax.transforms.one_shot import one_shot


def hrbp_prune(
    sparsity: float,
    *,
    group_size: int = 32,
    block_density: float | None = None,
    channel_block: int = 1,
    budget: Budget = "uniform",
    scores: scores_.Kind | PyTree = "magnitude",
    schedule: Schedule | None = None,
    drop_fraction: float = 0.3,
    where: tree.Where | None = None,
    key: Array | None = None,
    update: Schedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """HRBP: groups of similar filters that keep the same input channels and the same taps (HRBP++).

    The pattern is `patterns.block(group_size, block_density, channel_block)`: a layer keeps K
    channels and `ceil(block_density * kh * kw)` taps in every group, so its density is
    `K / cin * taps / (kh * kw)`; the counts are the whole numbers whose total density over the
    chosen leaves comes closest to `1 - sparsity`. Where that is off by more than half a percentage
    point of all weights (few, narrow layers), a layer may keep another number of taps. If the
    density is still off by more than half a point, or by more than 5% of the target itself, a
    warning gives the density reached. Groups, channels and taps maximise the kept score
    (`hrbp_groups`).

    Without a schedule masks are drawn once (`one_shot`). With one, they move at its steps
    (`drop_and_grow`, dynamic HRBP): in every group the kept channels of smallest summed magnitude
    are dropped and as many with the largest summed gradient grown; filters stay in their groups,
    taps stay, and that step applies no gradient. Dynamic HRBP and `scores="gradient"` need the full
    gradient at their update steps: any dense execution, or `conv(..., kernel_gradient="dense")`.

    Args:
      sparsity: fraction of the chosen weights to remove, in [0, 1).
      group_size: filters in a group; a layer whose filter count it does not divide uses the largest
        divisor below it, and warns where that is less than half of what can be.
      block_density: fraction of the taps that a block keeps, in (0, 1]; 1 keeps whole kernels (HRBP
        without "++"). None is 1/3; a layer whose density is above that (all of them at sparsity
        0.5) keeps as few taps as hold it, and a warning says so.
      channel_block: channels are kept in aligned runs of this many; likewise the largest divisor of
        cin.
      budget: "uniform", "erk", "er", "global" (outside of jit, and not with `scores="gradient"`),
        or a map layer name -> sparsity.
      scores: "magnitude", "gradient" (`|g|` of the first update), "random", or a tree of arrays
        (higher = keep).
      schedule: when masks move, e.g. `every(100, until=30_000)`; None = static masks.
      drop_fraction: fraction of the kept channels that moves at the schedule's start, in [0, 1].
      where: predicate (name, leaf) of the sparse leaves, default conv kernels except the stem; conv
        kernels, stacked ones too, and dense kernels `[cin, cout]`.
      key: JAX random key for `scores="random"`; None is `jax.random.key(0)`, the same masks in
        every run.
      update: deprecated name of `schedule`.

    Returns:
      An optax transformation that masks gradients; put it first in the chain, inside `keep_zeros`;
      read it with `get_masks`, `get_layouts`.

    Raises:
      ValueError: a bad argument, or at init a chosen leaf that holds no kernels.

    Example:
      >>> import blocksparse_jax as bsj, jax.numpy as jnp
      >>> params = {"conv": {"kernel": jnp.ones((3, 3, 64, 64)), "bias": jnp.zeros(64)}}
      >>> tx = bsj.sparse(bsj.hrbp_prune(0.9, group_size=32), optax.sgd(0.1, momentum=0.9))
      >>> bsj.get_layouts(tx.init(params))["conv"]["kernel"].packed_shape
      (2, 19, 3, 32)

    Reference: Ma et al., "HRBP: hardware-friendly regrouping towards block-based pruning for sparse
    CNN training", CPAL 2024; the equal group sizes and kept counts, the drop fraction and its
    period are our choice.
    """
    _checks.fraction("sparsity", sparsity)
    _checks.fraction("drop_fraction", drop_fraction, high_open=False)
    if schedule is not None and update is not None:
        raise ValueError("update: the deprecated name of `schedule`, got both; leave `update` out")
    schedule = update if schedule is None else schedule
    shared: dict[str, Any] = {
        "pattern": block(group_size, block_density, channel_block),
        "scores": scores,
        "budget": budget,
        "where": where,
        "key": key,
    }
    if schedule is None:
        return one_shot(sparsity, name="hrbp", **shared)
    check_schedule(schedule)
    return drop_and_grow(
        sparsity, fraction=drop_fraction, schedule=schedule, name="hrbp-dynamic", **shared
    )
