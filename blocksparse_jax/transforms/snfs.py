"""SNFS: dynamic sparse training of single weights, grown where the momentum is largest."""

import optax
from jaxtyping import Array

from blocksparse_jax import tree
from blocksparse_jax.budgets import Budget
from blocksparse_jax.patterns import Pattern
from blocksparse_jax.schedules import Schedule
from blocksparse_jax.transforms.drop_and_grow import drop_and_grow


def snfs(
    sparsity: float | None,
    *,
    pattern: Pattern | None = None,
    schedule: Schedule,
    drop_fraction: float = 0.3,
    momentum: float = 0.9,
    budget: Budget = "erk",
    where: tree.Where | None = None,
    key: Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SNFS: drops the smallest weights and grows those whose gradient's moving average is largest.

    `drop_and_grow` of single weights, dropped by `|w|` and grown by `|m|`, with
    `m = momentum * m + (1 - momentum) * g` of the dense gradient, kept in the method's own memory.
    So every step needs the dense gradient until the schedule ends. Layers keep their counts.

    Args:
      sparsity: fraction of the chosen weights to remove, in [0, 1); None where the pattern fixes
        it.
      pattern: which sets of weights are kept together; None is `patterns.unstructured()`, the
        paper's single weights. Those with a layout run in the block-sparse convolution.
      schedule: when masks change, e.g. `every(100, until=75_000)`.
      drop_fraction: the fraction at the schedule's start, in [0, 1].
      momentum: decay of the moving average, in [0, 1).
      budget: "erk", "uniform", "er", "global", or a map layer name -> sparsity.
      where: predicate (name, leaf) of the sparse leaves, default conv kernels except the stem.
      key: JAX random key of the first masks; None is `jax.random.key(0)`, the same in every run.

    Returns:
      An optax transformation that masks gradients; put it first in the chain, inside `keep_zeros`.

    Raises:
      ValueError: a bad argument.

    Example:
      >>> import blocksparse_jax as bsj, jax.numpy as jnp
      >>> state = snfs(0.9, schedule=bsj.every(100)).init({"w": jnp.ones((3, 3, 8, 8))})
      >>> state.memory["w"].shape, bsj.get_spec(state).dense_gradient(7)
      ((3, 3, 8, 8), True)

    Reference: Dettmers & Zettlemoyer, "Sparse networks from scratch", 2019, without its
    redistribution among layers, as in RigL's comparison (Evci et al., ICML 2020).
    """
    return drop_and_grow(
        sparsity,
        pattern=pattern,
        grow="momentum",
        fraction=drop_fraction,
        schedule=schedule,
        budget=budget,
        momentum=momentum,
        where=where,
        key=key,
        name="snfs",
    )
