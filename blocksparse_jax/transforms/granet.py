"""GraNet: gradual pruning over all layers, and as many weights exchanged at each step."""

import jax.numpy as jnp
import optax
from jaxtyping import Array

from blocksparse_jax import _checks, schedules, tree
from blocksparse_jax import scores as scores_
from blocksparse_jax.patterns import Kept, Pattern
from blocksparse_jax.schedules import Between, check_between
from blocksparse_jax.spec import Spec
from blocksparse_jax.transforms._base import sparse_transformation
from blocksparse_jax.transforms.exchange import (
    grow_highest,
    map_layers,
    refuse_fixed_counts,
    stay_highest,
    with_sets,
)
from blocksparse_jax.transforms.first_masks import first_masks
from blocksparse_jax.transforms.leaves import Leaf, Leaves, Step


def granet(
    sparsity: float,
    *,
    schedule: Between,
    pattern: Pattern | None = None,
    initial_sparsity: float = 0.0,
    fraction: float = 0.5,
    final_fraction: float = 0.005,
    power: float = 3.0,
    where: tree.Where | None = None,
    key: Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """GraNet: prunes gradually by one threshold, then drops and regrows a part of what is left.

    At each step of the schedule the sparsity of all layers together is
    `s_t = s_f + (s_i - s_f) * (1 - (t - start) / (end - start))^power`, by the largest `|w|` of all
    layers. Then each layer drops a part of its remaining weights, those with the smallest `|w|`,
    and grows as many with the largest `|g|` among all others, the just dropped ones included. The
    part falls along a cosine from `fraction` at the start to `final_fraction` at the end. Grown
    weights start at zero, and the step applies no gradient, as in `drop_and_grow`.

    While the counts change, `get_layouts(state)` reads the layouts of patterns that have one from
    the masks, outside of jit.

    Args:
      sparsity: final sparsity of the chosen leaves, in [0, 1).
      schedule: `between(start, end, every=...)`: the first step, the last, where the final sparsity
        is reached, and the steps between two; the paper's runs: every 1000 steps until epoch 110 of
        160. They need the full gradient.
      pattern: which sets of weights are kept together, but HRBP's blocks; None is
        `patterns.unstructured()`, as in the paper.
      initial_sparsity: sparsity at the start, at most the final one: 0 is the paper's
        dense-to-sparse training; above it the first masks are random, with ERK's shares.
      fraction: of the kept sets, exchanged at the first step, in [0, 1].
      final_fraction: at the last step, at most `fraction`.
      power: the exponent, above 0.
      where: predicate (name, leaf) of the sparse leaves, default conv kernels except the stem.
      key: JAX random key of the first masks; None is `jax.random.key(0)`, the same in every run.

    Returns:
      An optax transformation that masks gradients; put it first in the chain, inside `keep_zeros`
      (`sparse(method, optimizer)` does both).

    Raises:
      ValueError: a bad argument, or a pattern that fixes its own density or its counts.

    Example:
      >>> import blocksparse_jax as bsj
      >>> tx = bsj.sparse(granet(0.75, schedule=bsj.between(0, 2)), optax.sgd(0.1))
      >>> params = {"w": jnp.arange(64.0).reshape(1, 1, 8, 8)}
      >>> state, counts = tx.init(params), []
      >>> for _ in range(3):
      ...     _, state = tx.update(params, state, params)
      ...     counts.append(int(bsj.get_masks(state)["w"].sum()))
      >>> counts
      [64, 22, 16]

    Reference: Liu et al., "Sparse training via boosting pruning plasticity with neuroregeneration",
    NeurIPS 2021. Our choice: the cosine runs over the schedule, each layer keeps at least one set
    of weights in a row, and patterns other than single weights.
    """
    first = first_masks(initial_sparsity, pattern, "erk", "random", key)
    refuse_fixed_counts(first.pattern, "granet")
    _checks.fraction("sparsity", sparsity)
    _checks.fraction("initial_sparsity", initial_sparsity)
    if initial_sparsity > sparsity:
        raise ValueError(
            f"initial_sparsity: expected at most sparsity={sparsity}, got {initial_sparsity}"
        )
    check_between(schedule)
    _checks.fraction("fraction", fraction, high_open=False)
    _checks.fraction("final_fraction", final_fraction, high_open=False)
    if final_fraction > fraction:
        raise ValueError(
            f"final_fraction: expected at most fraction={fraction}, got {final_fraction}"
        )
    _checks.number("power", power, low_open=True)
    start, end = schedule.start, schedule.end

    def draw(chosen: dict[str, Array]) -> dict[str, Kept]:
        kept = first.at_init(chosen)
        return {
            name: Kept(kept[name].mask, first.pattern.shrinking(leaf.shape))
            for name, leaf in chosen.items()
        }

    def redraw(step: Step, leaves: Leaves) -> dict[str, Kept]:
        removed = schedules.cubic_sparsity(
            initial_sparsity, sparsity, step.count, start, end, power
        )
        part = final_fraction + schedules.cosine_fraction(
            fraction - final_fraction, step.count, start, end
        )
        remaining = {
            name: jnp.where(leaf.mask, scores_.magnitude(leaf.weights), -jnp.inf)
            for name, leaf in leaves.items()
        }
        counts = first.pattern.global_counts(remaining, 1 - removed)

        def exchange(layer: tuple[Leaf, Array], _: None) -> Kept:
            leaf, count = layer
            kept = first.pattern.kept_sets(leaf.mask, leaf.layout)
            sizes = first.pattern.sets(scores_.magnitude(leaf.weights), leaf.layout)
            gradients = first.pattern.sets(scores_.magnitude(leaf.grad), leaf.layout)
            active = jnp.minimum(kept.sum(-1, keepdims=True), count)
            moved = first.pattern.moves(part, active)
            stays = stay_highest(kept, sizes, active - moved)
            new = grow_highest(stays, kept, gradients, moved)
            return with_sets(first.pattern, new, leaf)

        layers = {name: (leaf, jnp.int32(counts[name])) for name, leaf in leaves.items()}
        return map_layers(exchange, first.pattern, layers, dict.fromkeys(layers))

    spec = Spec(
        "granet",
        1 - sparsity,
        schedule=schedule,
        gradient_schedule=schedule,
        pattern=first.pattern,
        skips_gradient=True,
        grows_by_gradient=True,
        resizes=True,
        has_layout=first.pattern.has_layout,
    )
    return sparse_transformation(spec, where=where, draw=draw, redraw=redraw)
