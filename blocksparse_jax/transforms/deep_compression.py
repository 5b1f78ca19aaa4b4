"""Deep Compression's pruning: magnitude pruning that the network recovers from."""

import optax

from blocksparse_jax import tree
from blocksparse_jax.budgets import Budget
from blocksparse_jax.schedules import Between
from blocksparse_jax.transforms.gradual import gradual


def deep_compression(
    sparsity: float,
    *,
    schedule: Between,
    budget: Budget = "uniform",
    where: tree.Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Prunes single weights by magnitude and retrains, the first of Deep Compression's three parts.

    The second, at a step after the schedule's end: `share_weights(params, masks)`, then training
    goes on with `shared_weights(optimizer)` and `set_clusters(state, clusters)`. The third:
    `compress(params)`.

    Args:
      sparsity: final sparsity of the chosen leaves, in [0, 1).
      schedule: `between(start, end, every=...)` of the pruning steps.
      budget: "uniform", "erk", "er", "global", or a map layer name -> sparsity.
      where: predicate (name, leaf) of the sparse leaves, default conv kernels except the stem.

    Returns:
      An optax transformation that masks gradients; put it first in the chain, inside `keep_zeros`:
      `sparse(deep_compression(...), shared_weights(optimizer))`.

    Raises:
      ValueError: a bad argument.

    Example:
      >>> import blocksparse_jax as bsj, jax.numpy as jnp
      >>> method = deep_compression(0.9, schedule=bsj.between(0, 100, every=10))
      >>> tx = bsj.sparse(method, bsj.shared_weights(optax.sgd(0.1)))
      >>> bsj.get_spec(tx.init({"w": jnp.ones((3, 3, 8, 8))})).method
      'deep-compression'

    Reference: Han, Mao & Dally, "Deep compression", ICLR 2016. The rising sparsity is that of
    `gradual`.
    """
    return gradual(sparsity, schedule=schedule, budget=budget, where=where, name="deep-compression")
