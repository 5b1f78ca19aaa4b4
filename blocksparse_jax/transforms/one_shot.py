"""One-shot pruning: masks from scores, once, and static training from there on."""

from collections.abc import Callable
from typing import Literal

import optax
from jaxtyping import Array, PyTree

from blocksparse_jax import _checks, patterns, tree
from blocksparse_jax import scores as scores_
from blocksparse_jax.budgets import Budget
from blocksparse_jax.patterns import Kept, Pattern
from blocksparse_jax.schedules import Never, Through
from blocksparse_jax.spec import Spec
from blocksparse_jax.transforms._base import sparse_transformation
from blocksparse_jax.transforms.first_masks import first_masks
from blocksparse_jax.transforms.leaves import Leaves, Step


def one_shot(
    sparsity: float | None,
    *,
    pattern: Pattern | None = None,
    scores: scores_.Kind | PyTree = "magnitude",
    budget: Budget = "uniform",
    where: tree.Where | None = None,
    key: Array | None = None,
    name: str = "one-shot",
) -> optax.GradientTransformationExtraArgs:
    """Prunes once, at init, and trains with these masks.

    With `scores="gradient"` masks are drawn by magnitude at init and anew by `|g|` in the first
    update, which needs the full gradient.

    Args:
      sparsity: fraction of the chosen weights to remove, in [0, 1); None where the pattern fixes
        it.
      pattern: which sets of weights are kept together; None is `patterns.unstructured()`.
      scores: "magnitude" (`|w|`), "gradient" (`|g|` of the first update), "random", or a tree of
        arrays (higher = keep), e.g. from `snip`.
      budget: "uniform", "erk", "er", "global" (with a pattern that has a layout: outside of jit,
        and not with "gradient"), or a map layer name -> sparsity.
      where: predicate (name, leaf) of the sparse leaves, default conv kernels except the stem.
      key: JAX random key for `scores="random"`; None is `jax.random.key(0)`, the same masks in
        every run.
      name: of the method, for reports.

    Returns:
      An optax transformation that masks gradients; put it first in the chain, inside `keep_zeros`
      (`sparse(method, optimizer)` does both).

    Raises:
      ValueError: a bad argument, or at init a chosen leaf that the pattern cannot divide.

    Example:
      >>> import blocksparse_jax as bsj, jax.numpy as jnp
      >>> params = {"conv": jnp.arange(4096.0).reshape(1, 1, 64, 64)}
      >>> method = one_shot(0.75, pattern=bsj.patterns.one_by_n(16), budget="global")
      >>> int(bsj.get_masks(method.init(params))["conv"].sum())
      1024
    """
    first = first_masks(sparsity, pattern, budget, scores, key)
    due = Through(0) if first.by_gradient else Never()

    def redraw(step: Step, leaves: Leaves) -> dict[str, Kept]:
        return first.from_gradient(leaves)

    def spec(chosen: dict[str, Array]) -> Spec:
        return Spec(
            name,
            first.density(chosen),
            schedule=due,
            gradient_schedule=due,
            pattern=first.pattern,
            grows_by_gradient=first.by_gradient,
            has_layout=first.pattern.has_layout,
        )

    return sparse_transformation(
        spec, where=where, draw=first.at_init, redraw=redraw if first.by_gradient else None
    )


Granularity = Literal["weight", "vector", "kernel", "filter"]
GRANULARITIES: dict[Granularity, Callable[[], Pattern]] = {
    "weight": patterns.unstructured,
    "vector": patterns.vector,
    "kernel": patterns.kernel,
    "filter": patterns.channel,
}


def magnitude(
    sparsity: float,
    *,
    pattern: Pattern | None = None,
    granularity: Granularity | None = None,
    budget: Budget = "uniform",
    where: tree.Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """One-shot magnitude pruning: keeps the largest `|w|` of the parameters that init sees.

    Args:
      sparsity: fraction of the chosen weights to remove, in [0, 1).
      pattern: which sets of weights are kept together; None is `patterns.unstructured()`.
      granularity: in place of a pattern, how coarse the sets are: "weight", "vector" (a row of a
        kernel slice), "kernel" (a kernel slice) or "filter" (an output channel), by their summed
        magnitude.
      budget: "uniform", "erk", "er", "global", or a map layer name -> sparsity.
      where: predicate (name, leaf) of the sparse leaves, default conv kernels except the stem.

    Returns:
      An optax transformation that masks gradients; put it first in the chain, inside `keep_zeros`.

    Raises:
      ValueError: a bad argument, both a pattern and a granularity, or at init a chosen leaf that
        the pattern cannot divide.

    Example:
      >>> import blocksparse_jax as bsj, jax.numpy as jnp
      >>> params = {"conv": jnp.arange(64.0).reshape(1, 1, 8, 8)}
      >>> bsj.get_masks(magnitude(0.5).init(params))["conv"].reshape(-1)[31:33].tolist()
      [False, True]

    Reference: Han et al., "Learning both weights and connections", NeurIPS 2015; the granularities
    of Mao et al., "Exploring the granularity of sparsity", 2017.
    """
    if granularity is not None:
        _checks.choice("granularity", granularity, GRANULARITIES)
        if pattern is not None:
            raise ValueError(
                f"granularity: {granularity!r} is a pattern of its own, so pattern={pattern} has "
                "no effect; leave one of them out"
            )
        pattern = GRANULARITIES[granularity]()
    return one_shot(sparsity, pattern=pattern, budget=budget, where=where, name="magnitude")
