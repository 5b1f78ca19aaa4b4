"""N:M sparsity with straight-through gradients: STE and SR-STE."""

import dataclasses

import optax
from jaxtyping import Array, Bool, Float

from blocksparse_jax import _checks, tree
from blocksparse_jax.layout_nodes import Dense
from blocksparse_jax.patterns import Kept, n_of_m
from blocksparse_jax.patterns.n_of_m import Axis, NOfM
from blocksparse_jax.schedules import Always
from blocksparse_jax.scores import magnitude
from blocksparse_jax.selection import ranks_of_stored
from blocksparse_jax.spec import Spec
from blocksparse_jax.transforms._base import decay_of_pruned, sparse_transformation
from blocksparse_jax.transforms.leaves import Leaves, Step


@dataclasses.dataclass(frozen=True)
class _LargestOfRun:
    """Weights -> N:M mask; compares by value, so it can sit in a static field."""

    pattern: NOfM

    def __call__(self, weights: Float[Array, "..."]) -> Bool[Array, "..."]:
        runs = self.pattern.sets(magnitude(weights), Dense())
        return self.pattern.mask(ranks_of_stored(runs) < self.pattern.n, weights.shape)


def sr_ste(
    n: int = 2,
    m: int = 4,
    decay: float = 2e-4,
    *,
    axis: Axis = "input",
    where: tree.Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SR-STE: the forward pass uses the n largest of each m weights, all weights are trained.

    The gradient `g` taken at `w~ = mask * w` (from `masked(params, state)`) goes to all weights,
    plus `decay * (1 - mask) * w`; the mask is the one of the present weights at every step.

    Args:
      n: kept weights in a run.
      m: length of a run, a divisor of the axis.
      decay: lambda, the pull of pruned weights towards zero.
      axis: "input": runs over input channels (the authors' NHWC form); "kernel": over (channel, y,
        x) of one filter.
      where: predicate (name, leaf) of the sparse leaves, default conv kernels except the stem.

    Returns:
      An optax transformation for the head of the chain, before momentum and weight decay.

    Raises:
      ValueError: bad n, m or decay; at init, a leaf whose axis m does not divide, by name.

    Example:
      >>> import blocksparse_jax as bsj, jax.numpy as jnp
      >>> params = {"conv": jnp.arange(1.0, 9.0).reshape(1, 1, 8, 1)}
      >>> tx = bsj.sr_ste(2, 4, decay=0.1)
      >>> grads = {"conv": jnp.zeros((1, 1, 8, 1))}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> [round(u, 3) for u in updates["conv"].reshape(-1).tolist()]
      [0.1, 0.2, 0.0, 0.0, 0.5, 0.6, 0.0, 0.0]

    Reference: Zhou et al., "Learning N:M fine-grained structured sparse neural networks from
    scratch", ICLR 2021, equation 9. Our choice: a dense stem by default, and the first of equal
    weights (the authors' code prunes the stem too, and keeps the last).
    """
    pattern = n_of_m(n, m, axis)
    decay = _checks.number("decay", decay)
    rule = _LargestOfRun(pattern)

    def draw(chosen: dict[str, Array]) -> dict[str, Kept]:
        pattern.check_leaves(chosen)
        return {name: Kept(rule(leaf), Dense()) for name, leaf in chosen.items()}

    def redraw(step: Step, leaves: Leaves) -> dict[str, Kept]:
        return draw({name: leaf.weights for name, leaf in leaves.items()})

    spec = Spec(
        "sr-ste" if decay else "ste",
        pattern.density,
        schedule=Always(),
        gradient_schedule=Always(),
        pattern=pattern,
        straight_through=True,
        rule=rule,
    )
    return sparse_transformation(
        spec, where=where, draw=draw, redraw=redraw, penalty=decay_of_pruned(decay)
    )


def ste(
    n: int = 2, m: int = 4, *, axis: Axis = "input", where: tree.Where | None = None
) -> optax.GradientTransformationExtraArgs:
    """STE: N:M sparsity with the plain straight-through gradient, `sr_ste` with decay 0.

    Args:
      n: kept weights in a run.
      m: length of a run.
      axis: as in `sr_ste`.
      where: as in `sr_ste`.

    Returns:
      An optax transformation.

    Raises:
      ValueError: as `sr_ste`.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"conv": jnp.ones((1, 1, 8, 1))}
      >>> tx = ste(2, 4)
      >>> float(tx.update(params, tx.init(params), params)[0]["conv"].sum())
      8.0

    Reference: Zhou et al., ICLR 2021, equation 4.
    """
    return sr_ste(n, m, 0.0, axis=axis, where=where)
