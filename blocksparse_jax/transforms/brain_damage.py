"""Group-wise brain damage: the same taps of a channel go from all filters."""

import optax

from blocksparse_jax import tree
from blocksparse_jax.patterns import Pattern, channel_tap
from blocksparse_jax.schedules import Between
from blocksparse_jax.transforms.group_lasso import group_lasso


def brain_damage(
    sparsity: float,
    *,
    schedule: Between,
    strength: float = 5e-4,
    threshold: float = 1e-2,
    gradual: bool = True,
    pattern: Pattern | None = None,
    where: tree.Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Group sparsity on the weights that all filters have at one tap of one input channel.

    Group lasso on these sets. Gradual, the penalty is truncated to the sets of the smallest norms,
    as many in each layer as the sparsity removes, and a set is pruned as soon as it is near zero;
    else all sets are penalised, and the smallest are cut off once, at the schedule's end.

    Args:
      sparsity: final sparsity of the chosen leaves, in [0, 1).
      schedule: `between(start, end, every=...)`: the pruning steps.
      strength: lambda, of the penalty.
      threshold: root mean square of a set's weights below which it is pruned, where gradual.
      gradual: see above.
      pattern: the sets; None is `patterns.channel_tap()`. `patterns.channel("input")`, all taps of
        a channel, has a layout.
      where: predicate (name, leaf) of the sparse leaves, default conv kernels except the stem.

    Returns:
      An optax transformation that masks gradients; put it first in the chain, inside `keep_zeros`
      (`sparse(method, optimizer)` does both).

    Raises:
      ValueError: as `group_lasso`.

    Example:
      >>> import blocksparse_jax as bsj, jax.numpy as jnp
      >>> params = {"w": jnp.arange(64.0).reshape(1, 1, 8, 8)}
      >>> tx = bsj.sparse(brain_damage(0.5, schedule=bsj.between(0, 1)), optax.sgd(0.1))
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update({"w": jnp.zeros((1, 1, 8, 8))}, state, params)
      >>> bsj.get_masks(state)["w"].any(-1).astype(int).tolist()
      [[[0, 0, 0, 0, 1, 1, 1, 1]]]

    Reference: Lebedev & Lempitsky, "Fast ConvNets using group-wise brain damage", CVPR 2016. Where
    the penalty is truncated, the strength, the threshold and the end that enforces the sparsity are
    our choice.
    """
    return group_lasso(
        sparsity,
        pattern=channel_tap() if pattern is None else pattern,
        schedule=schedule,
        strength=strength,
        threshold=threshold if gradual else 0.0,
        truncated=gradual,
        where=where,
        name="brain-damage",
    )
