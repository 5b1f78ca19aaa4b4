"""RigL: dynamic sparse training of single weights, grown where the gradient is largest."""

import optax
from jaxtyping import Array

from blocksparse_jax import _checks, tree
from blocksparse_jax.budgets import Budget
from blocksparse_jax.patterns import Pattern
from blocksparse_jax.schedules import Schedule, every
from blocksparse_jax.transforms.drop_and_grow import drop_and_grow


def rigl(
    sparsity: float | None,
    *,
    pattern: Pattern | None = None,
    schedule: Schedule | None = None,
    drop_fraction: float = 0.3,
    budget: Budget = "erk",
    where: tree.Where | None = None,
    key: Array | None = None,
    update_every: int | None = None,
    start: int | None = None,
    until: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """RigL: drops the smallest weights and grows the connections with the largest gradient.

    `drop_and_grow` of single weights, dropped by `|w|` and grown by `|g|`; masks start at random.
    At a step of the schedule the gradient must be the full one, as any dense execution gives it.
    That step changes masks instead of applying a gradient, and it counts: learning-rate schedules
    and step counts go on, so a run of n steps applies n gradients less one for each update of the
    masks (the authors' code leaves the optimizer's step as it is there, and trains that much
    longer).

    Args:
      sparsity: fraction of the chosen weights to remove, in [0, 1); None where the pattern fixes
        it.
      pattern: which sets of weights are kept together; None is `patterns.unstructured()`, the
        paper's single weights. Those with a layout run in the block-sparse convolution.
      schedule: when masks change, e.g. `every(100, until=75_000)` (the paper: until 0.75 of
        training).
      drop_fraction: the fraction at the schedule's start, in [0, 1].
      budget: "erk", "uniform", "er", "global", or a map layer name -> sparsity.
      where: predicate (name, leaf) of the sparse leaves, default conv kernels except the stem.
      key: JAX random key of the first masks; None is `jax.random.key(0)`, the same masks in every
        run.
      update_every: deprecated, as are `start` and `until`: they mean
        `schedule=every(update_every, start, until)`; 100 where it is left out.
      start: deprecated, see `update_every`.
      until: deprecated, see `update_every`.

    Returns:
      An optax transformation that masks gradients; put it first in the chain, inside `keep_zeros`.

    Raises:
      ValueError: a bad argument, or a deprecated one beside `schedule`.

    Example:
      >>> import blocksparse_jax as bsj, jax.numpy as jnp
      >>> tx = bsj.sparse(bsj.rigl(0.9, schedule=bsj.every(100, until=1000)), optax.sgd(0.1))
      >>> int(bsj.get_masks(tx.init({"w": jnp.ones((3, 3, 8, 8))}))["w"].sum())
      58

    Reference: Evci et al., "Rigging the lottery: making all tickets winners", ICML 2020, algorithm
    1.
    """
    if schedule is None:
        steps = 100 if update_every is None else update_every
        first = 0 if start is None else start
        schedule = every(_checks.positive_int("update_every", steps), first, until)
    elif (update_every, start, until) != (None, None, None):
        raise ValueError(
            "update_every: deprecated beside `schedule`, got both; leave update_every, start and "
            "until out"
        )
    return drop_and_grow(
        sparsity,
        pattern=pattern,
        fraction=_checks.fraction("drop_fraction", drop_fraction, high_open=False),
        schedule=schedule,
        budget=budget,
        where=where,
        key=key,
        name="rigl",
    )
