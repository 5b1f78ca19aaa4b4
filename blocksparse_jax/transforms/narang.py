"""A threshold for each layer that rises along two slopes while the network trains."""

from collections.abc import Mapping

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from blocksparse_jax import _checks, tree
from blocksparse_jax import scores as scores_
from blocksparse_jax.alike import map_alike
from blocksparse_jax.budgets import Budget, layer_densities, target_density
from blocksparse_jax.counts import weight_counts
from blocksparse_jax.patterns import Kept, unstructured
from blocksparse_jax.schedules import Between, check_between
from blocksparse_jax.selection import highest
from blocksparse_jax.spec import Spec
from blocksparse_jax.transforms._base import sparse_transformation
from blocksparse_jax.transforms.first_masks import keep_all
from blocksparse_jax.transforms.leaves import Leaf, Leaves, Step


def narang(
    sparsity: float,
    *,
    schedule: Between,
    ramp: int | None = None,
    slope_ratio: float = 1.5,
    thresholds: Mapping[str, float] | None = None,
    budget: Budget = "uniform",
    where: tree.Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Prunes each layer below a threshold that rises, slowly at first, then `slope_ratio` as fast.

    At each step t of the schedule (start, ramp, end, every f steps) the weights with `|w|` below
    `e(t)` go, and stay away:

        e(t) = theta * (t - start + 1) / f                                    before the ramp
        e(t) = (theta * (ramp - start + 1) + phi * (t - ramp + 1)) / f        from the ramp on
        theta = q * f / ((ramp - start) + r * (end - ramp)),   phi = r * theta,   r = slope_ratio

    where q is the threshold that the layer is to reach. With r = 1.5 that is the paper's
    `theta = 2 q f / (2 (ramp - start) + 3 (end - ramp))`. Without `thresholds`, q is at each step
    the `|w|` that as many weights of the layer reach as its density keeps, so that the last step
    ends at the target (ties all stay). e never exceeds q.

    Args:
      sparsity: final sparsity of the chosen leaves, in [0, 1): the quantile that q is.
      schedule: `between(start, end, every=100)`; the paper: from the end of the first epoch to half
        of training.
      ramp: the step from which the second slope holds, inside the schedule; None is the middle (the
        paper: a quarter of training).
      slope_ratio: r, at least 1; the paper: 1.5 to 2.
      thresholds: layer name -> q, above 0, e.g. the quantiles of a network trained densely, as in
        the paper; None as above, as for the layers that it does not name.
      budget: "uniform", "erk", "er", or a map layer name -> sparsity.
      where: predicate (name, leaf) of the sparse leaves, default conv kernels except the stem.

    Returns:
      An optax transformation that masks gradients; put it first in the chain, inside `keep_zeros`
      (`sparse(method, optimizer)` does both).

    Raises:
      ValueError: a bad argument, or a name in `thresholds` that is no sparse layer.

    Example:
      >>> import blocksparse_jax as bsj
      >>> method = narang(0.75, schedule=bsj.between(0, 4))
      >>> params = {"w": jnp.arange(64.0).reshape(1, 1, 8, 8)}
      >>> state, counts = method.init(params), []
      >>> for _ in range(5):
      ...     _, state = method.update(params, state, params)
      ...     counts.append(int(bsj.get_masks(state)["w"].sum()))
      >>> counts
      [54, 44, 20, 16, 16]

    Reference: Narang et al., "Exploring sparsity in recurrent neural networks", ICLR 2017,
    algorithm 1 and equation 1. Our choice: q from the layer's own weights while they train, the
    bound e <= q, and the largest weight of a layer, which always stays.
    """
    check_between(schedule)
    _checks.fraction("sparsity", sparsity)
    start, end = schedule.start, schedule.end
    middle = (start + end) // 2 if ramp is None else _checks.step("ramp", ramp)
    if not start <= middle <= end:
        raise ValueError(f"ramp: expected a step from {start} to {end}, got {middle}")
    slope_ratio = _checks.number("slope_ratio", slope_ratio, low=1.0)
    given = dict(thresholds or {})
    for name, value in given.items():
        _checks.number(f"thresholds[{name!r}]", value, low_open=True)
    if budget == "global":
        raise ValueError(
            "budget: narang has a threshold for each layer, got 'global'; use 'uniform', 'erk', "
            "'er' or a map layer name -> sparsity"
        )

    def reached(count: Array) -> Float[Array, ""]:
        """The threshold as a part of q."""
        before = (jnp.minimum(count, middle) - start + 1).astype(jnp.float32)
        after = slope_ratio * jnp.maximum(count - middle + 1, 0).astype(jnp.float32)
        whole = (middle - start) + slope_ratio * (end - middle)
        part = (before + after) / whole
        return jnp.where(count >= end, 1.0, jnp.minimum(part, 1.0))

    def draw(chosen: dict[str, Array]) -> dict[str, Kept]:
        if unknown := [name for name in given if name not in chosen]:
            raise ValueError(
                f"thresholds: {unknown[0]!r} is no sparse layer, expected names among "
                f"{list(chosen)[:8]}"
            )
        return keep_all(unstructured(), chosen)

    def redraw(step: Step, leaves: Leaves) -> dict[str, Kept]:
        shapes = {name: leaf.mask.shape for name, leaf in leaves.items()}
        counts = weight_counts(layer_densities(budget, shapes, sparsity), shapes)
        part = reached(step.count)

        def prune(leaf: Leaf, static: tuple[int, float | None]) -> Kept:
            count, limit = static
            size = scores_.magnitude(leaf.weights)
            smallest_kept = jnp.where(highest(size, count), size, jnp.inf).min()
            q = smallest_kept if limit is None else limit
            mask = leaf.mask & ((size >= part * q) | highest(size, 1))
            return Kept(mask, leaf.layout)

        static = {name: (counts[name], given.get(name)) for name in leaves}
        return map_alike(prune, leaves, static)

    def spec(chosen: dict[str, Array]) -> Spec:
        return Spec(
            "narang",
            target_density(budget, tree.shapes(chosen), sparsity),
            schedule=schedule,
            pattern=unstructured(),
            resizes=True,
        )

    return sparse_transformation(spec, where=where, draw=draw, redraw=redraw)
