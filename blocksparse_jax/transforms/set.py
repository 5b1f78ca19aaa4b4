"""SET: dynamic sparse training of single weights, grown at random."""

from typing import Literal

import optax
from jaxtyping import Array

from blocksparse_jax import _checks, tree
from blocksparse_jax.budgets import Budget
from blocksparse_jax.patterns import Pattern
from blocksparse_jax.schedules import Schedule
from blocksparse_jax.transforms.drop_and_grow import drop_and_grow


def set_(
    sparsity: float | None,
    *,
    pattern: Pattern | None = None,
    schedule: Schedule,
    drop_fraction: float = 0.3,
    drop: Literal["magnitude", "signed"] = "magnitude",
    budget: Budget = "er",
    where: tree.Where | None = None,
    key: Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SET: drops the smallest weights and grows as many others at random.

    `drop_and_grow` of single weights, or of any pattern's sets, grown uniformly at random; it needs
    no dense gradient. With a schedule that has no end the fraction is constant, as in SET; with one
    it falls along RigL's cosine.

    Args:
      sparsity: fraction of the chosen weights to remove, in [0, 1); None where the pattern fixes
        it.
      pattern: which sets of weights are kept together; None is `patterns.unstructured()`, the
        paper's single weights. Those with a layout run in the block-sparse convolution.
      schedule: when masks change; the paper: once an epoch, `every(steps_per_epoch)`.
      drop_fraction: the fraction at the schedule's start, in [0, 1].
      drop: "magnitude", the smallest `|w|` (RigL's comparison, and the rule that every pattern
        has), or "signed", the paper's: the fraction of the positive weights that is nearest to zero
        and as large a fraction of the negative ones, with all weights that are zero; of single
        weights only.
      budget: "er" (the paper), "erk", "uniform", "global", or a map layer name -> sparsity.
      where: predicate (name, leaf) of the sparse leaves, default conv kernels except the stem.
      key: JAX random key of masks and growth; None is `jax.random.key(0)`, the same in every run.

    Returns:
      An optax transformation that masks gradients; put it first in the chain, inside `keep_zeros`.

    Raises:
      ValueError: a bad argument.

    Example:
      >>> import blocksparse_jax as bsj, jax.numpy as jnp
      >>> state = set_(0.9, schedule=bsj.every(100)).init({"w": jnp.ones((3, 3, 8, 8))})
      >>> int(bsj.get_masks(state)["w"].sum()), bsj.get_spec(state).dense_gradient(100)
      (58, False)

    Reference: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
    connectivity", Nature Communications 2018, which drops by sign; dropping by `|w|` follows RigL's
    comparison (Evci et al., 2020). Other patterns than single weights are our choice.
    """
    _checks.choice("drop", drop, ("magnitude", "signed"))
    return drop_and_grow(
        sparsity,
        pattern=pattern,
        drop=drop,
        grow="random",
        fraction=drop_fraction,
        schedule=schedule,
        budget=budget,
        where=where,
        key=key,
        name="set",
    )
