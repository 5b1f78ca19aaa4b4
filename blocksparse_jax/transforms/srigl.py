"""SRigL: RigL with as many weights in every filter, where filters may be ablated."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from blocksparse_jax import _checks, schedules, tree
from blocksparse_jax import scores as scores_
from blocksparse_jax.alike import map_alike
from blocksparse_jax.budgets import Budget, layer_densities
from blocksparse_jax.patterns import Kept, fan_in
from blocksparse_jax.schedules import Schedule, check_schedule
from blocksparse_jax.selection import highest
from blocksparse_jax.spec import Spec
from blocksparse_jax.transforms._base import sparse_transformation
from blocksparse_jax.transforms.exchange import grow_highest, stay_highest
from blocksparse_jax.transforms.first_masks import first_masks
from blocksparse_jax.transforms.leaves import Leaf, Leaves, Step


def srigl(
    sparsity: float,
    *,
    schedule: Schedule,
    drop_fraction: float = 0.3,
    min_salient: float = 0.3,
    budget: Budget = "erk",
    where: tree.Where | None = None,
    key: Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SRigL: constant fan-in with neuron ablation.

    Every filter (output neuron) of a layer keeps as many weights k. At each step of the schedule a
    layer with n weights moves `K = floor(f * n)` of them, f along RigL's cosine:

    1. A weight is salient if it stays when the K smallest `|w|` of the layer are dropped, or if its
       `|g|` is among the K largest of the pruned weights of live filters.
    2. Filters with fewer than `min_salient * k` salient weights are ablated: all their weights go,
       for good.
    3. The fan-in becomes `n_0 / (live filters)`, rounded down, n_0 the layer's weights at init.
    4. The K smallest weights of the layer are dropped, and each live filter grows those with its
       largest `|g|` until it has its fan-in.

    So a layer never has more weights than at init, and fewer only by the rounding. Grown weights
    start at zero, and the step applies no gradient, as in `rigl`.

    Args:
      sparsity: fraction of the chosen weights to remove, in [0, 1).
      schedule: when masks change, e.g. `every(100, until=75_000)`; these steps need the full
        gradient.
      drop_fraction: f at the schedule's start, in [0, 1].
      min_salient: the part of its fan-in that a filter needs as salient weights, in [0, 1]; 0
        ablates none.
      budget: "erk", "uniform", "er", or a map layer name -> sparsity.
      where: predicate (name, leaf) of the sparse leaves, default conv kernels except the stem.
      key: JAX random key of the first masks; None is `jax.random.key(0)`, the same in every run.

    Returns:
      An optax transformation that masks gradients; put it first in the chain, inside `keep_zeros`
      (`sparse(method, optimizer)` does both).

    Raises:
      ValueError: a bad argument.

    Example:
      >>> import blocksparse_jax as bsj
      >>> params = {"w": jnp.ones((3, 3, 8, 8)).at[..., :4].set(1e-3)}
      >>> tx = bsj.sparse(srigl(0.9, schedule=bsj.every(1), drop_fraction=0.5), optax.sgd(0.1))
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     _, state = tx.update(params, state, params)
      >>> bsj.get_masks(state)["w"].sum((0, 1, 2)).tolist()
      [0, 0, 0, 0, 14, 14, 14, 14]

    Reference: Lasby et al., "Dynamic sparse training with structured sparsity", ICLR 2024. Our
    choice: ablated filters stay ablated; the fan-in is rounded down; a layer keeps the filters with
    most salient weights that it needs to hold its weights, at least one.
    """
    pattern = fan_in()
    first = first_masks(sparsity, pattern, budget, "random", key)
    check_schedule(schedule)
    _checks.fraction("drop_fraction", drop_fraction, high_open=False)
    _checks.fraction("min_salient", min_salient, high_open=False)
    if budget == "global":
        raise ValueError(
            "budget: 'global' has no meaning for srigl, whose first masks are random; use 'erk', "
            "'uniform', 'er' or a map layer name -> sparsity"
        )
    start, until = getattr(schedule, "start", 0), getattr(schedule, "until", None)

    def redraw(step: Step, leaves: Leaves) -> dict[str, Kept]:
        part = schedules.cosine_fraction(drop_fraction, step.count, start, until)
        shapes = {name: leaf.mask.shape for name, leaf in leaves.items()}
        counts = pattern.counts(shapes, layer_densities(budget, shapes, sparsity))

        def move(leaf: Leaf, count: int) -> Kept:
            kept = pattern.kept_sets(leaf.mask, leaf.layout)
            size = pattern.sets(scores_.magnitude(leaf.weights), leaf.layout)
            gradient = pattern.sets(scores_.magnitude(leaf.grad), leaf.layout)
            number, fan, live = kept.sum(), kept.sum(1).max(), kept.any(1)
            moved = jnp.floor(part * number.astype(part.dtype)).astype(jnp.int32)

            stays = _highest_of_layer(kept, size, number - moved)
            wanted = _highest_of_layer(~kept & live[:, None], gradient, moved)
            salient = (stays | wanted).sum(1).astype(jnp.float32)
            total = count * len(kept)
            ranked = jnp.where(live, salient, -1)
            needed = highest(ranked, -(-total // size.shape[1]))
            # as float32, 0.7 * 10 may be above 7
            live &= (salient >= min_salient * fan.astype(jnp.float32) - 1e-4) | needed

            stays &= live[:, None]
            missing = jnp.where(live, total // live.sum() - stays.sum(1), 0)
            new = grow_highest(stays, kept, gradient, missing[:, None])
            return Kept(pattern.mask(new, leaf.mask.shape), leaf.layout)

        return map_alike(move, leaves, counts)

    def spec(chosen: dict[str, Array]) -> Spec:
        return Spec(
            "srigl",
            first.density(chosen),
            schedule=schedule,
            gradient_schedule=schedule,
            pattern=pattern,
            skips_gradient=True,
            grows_by_gradient=True,
            resizes=True,
        )

    return sparse_transformation(spec, where=where, draw=first.at_init, redraw=redraw)


def _highest_of_layer(
    among: Bool[Array, "filters n"], scores: Float[Array, "filters n"], count: Int[Array, ""]
) -> Bool[Array, "filters n"]:
    """The highest scores of a layer among some of its weights, whichever filters they are of."""
    best = stay_highest(among.reshape(1, -1), scores.reshape(1, -1), count)
    return best.reshape(among.shape)
