"""NeST: grows from a sparse seed by gradient, then prunes by magnitude."""

import jax.numpy as jnp
import optax
from jaxtyping import Array

from blocksparse_jax import _checks, tree
from blocksparse_jax import scores as scores_
from blocksparse_jax.alike import map_alike
from blocksparse_jax.budgets import Budget, layer_densities, target_density
from blocksparse_jax.patterns import Kept, Pattern
from blocksparse_jax.schedules import AnyOf, Between, Through, check_between
from blocksparse_jax.spec import Spec
from blocksparse_jax.transforms._base import sparse_transformation
from blocksparse_jax.transforms.exchange import (
    grow_highest,
    refuse_fixed_counts,
    stay_highest,
    with_sets,
)
from blocksparse_jax.transforms.first_masks import first_masks
from blocksparse_jax.transforms.leaves import Leaf, Leaves, Step


def nest(
    sparsity: float,
    *,
    schedule: Between,
    grow_until: int | None = None,
    seed: float = 0.5,
    peak: float = 2.0,
    power: float = 3.0,
    pattern: Pattern | None = None,
    budget: Budget = "uniform",
    where: tree.Where | None = None,
    key: Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """NeST: grow and prune.

    Training starts from random masks, the seed, of `seed` times the final density. At the steps of
    the schedule through `grow_until` a layer grows in equal portions, until the last of these steps
    makes it `peak` times the final density: the pruned sets of weights with the largest
    `|sum of gradients since the last step|` come. At the later steps it is pruned: the sets with
    the largest `|w|` stay, and the surplus over the final density falls as `(1 - t)^power`, t from
    0 at the end of the growth to 1 at the end of the schedule.

    Grown weights start at zero; steps that change masks apply no gradient. The gradients are summed
    in the method's own memory, those that are not finite left out, so every step through
    `grow_until` needs the full gradient, and the mask updates after it as well.

    While the counts change, `get_layouts(state)` reads the layouts of patterns that have one from
    the masks, outside of jit.

    Args:
      sparsity: final sparsity of the chosen leaves, in [0, 1).
      schedule: `between(start, end, every=...)`, when masks change.
      grow_until: the step through which weights are grown, inside the schedule; None is its middle.
      seed: density of the seed, as a multiple of the final density, above 0 and at most `peak`.
      peak: density after the growth, likewise, at least 1; no layer grows beyond its weights.
      power: the exponent of the pruning, above 0.
      pattern: which sets of weights are kept together, but HRBP's blocks; None is
        `patterns.unstructured()`.
      budget: "uniform", "erk", "er", or a map layer name -> sparsity (of the final masks).
      where: predicate (name, leaf) of the sparse leaves, default conv kernels except the stem.
      key: JAX random key of the seed; None is `jax.random.key(0)`, the same in every run.

    Returns:
      An optax transformation that masks gradients; put it first in the chain, inside `keep_zeros`
      (`sparse(method, optimizer)` does both).

    Raises:
      ValueError: a bad argument, or a pattern that fixes its own density or its counts.

    Example:
      >>> import blocksparse_jax as bsj
      >>> method = nest(0.75, schedule=bsj.between(0, 4))
      >>> params = {"w": jnp.arange(64.0).reshape(1, 1, 8, 8)}
      >>> state, counts = method.init(params), []
      >>> for _ in range(5):
      ...     _, state = method.update(params, state, params)
      ...     counts.append(int(bsj.get_masks(state)["w"].sum()))
      >>> counts
      [8, 20, 32, 18, 16]

    Reference: Dai et al., "NeST: a neural network synthesis tool based on a grow-and-prune
    paradigm", IEEE Transactions on Computers 2019. Connections grow and are pruned; neurons and
    feature maps grow between two steps, with `grow_channels`; areas of feature maps are not pruned
    (partial-area convolution). Our choice, where the paper has thresholds set by hand: the
    densities of seed and peak, equal portions of growth and the curve of the pruning.
    """
    pattern = first_masks(sparsity, pattern, budget, "random", key).pattern
    _checks.fraction("sparsity", sparsity)
    refuse_fixed_counts(pattern, "nest")
    if budget == "global":
        raise ValueError(
            "budget: nest grows and prunes each layer to its own count, got 'global'; use "
            "'uniform', 'erk', 'er' or a map layer name -> sparsity"
        )
    check_between(schedule)
    start, end = schedule.start, schedule.end
    middle = (start + end) // 2 if grow_until is None else _checks.step("grow_until", grow_until)
    if not start <= middle < end:
        raise ValueError(f"grow_until: expected a step from {start} to {end - 1}, got {middle}")
    middle -= (middle - start) % schedule.every  # the last step that grows
    peak = _checks.number("peak", peak, low=1.0)
    seed = _checks.number("seed", seed, low_open=True)
    if seed > peak:
        raise ValueError(f"seed: expected at most peak={peak}, got {seed}")
    _checks.number("power", power, low_open=True)
    random_key = _checks.random_key("key", key)

    def counts(shapes: dict[str, tuple[int, ...]], factor: float) -> dict[str, int]:
        """Sets in a row at a multiple of the final density."""
        final = layer_densities(budget, shapes, sparsity)
        densities = {name: min(1.0, factor * density) for name, density in final.items()}
        return pattern.counts(shapes, densities)

    def draw(chosen: dict[str, Array]) -> dict[str, Kept]:
        pattern.check_leaves(chosen)
        scores = scores_.make("random", chosen, None, random_key)
        sizes = counts(tree.shapes(chosen), seed)
        return {
            name: Kept(pattern.draw(scores[name], sizes[name]).mask, pattern.shrinking(leaf.shape))
            for name, leaf in chosen.items()
        }

    def remember(step: Step, leaf: Leaf) -> Array:
        gradient = leaf.grad.astype(jnp.float32)
        total = jnp.where(schedule(step.count - 1), 0, leaf.memory)
        total = total + jnp.where(jnp.isfinite(gradient), gradient, 0)
        return jnp.where(step.count <= middle, total, 0)

    def redraw(step: Step, leaves: Leaves) -> dict[str, Kept]:
        shapes = {name: leaf.mask.shape for name, leaf in leaves.items()}
        stages = zip(*(counts(shapes, factor).values() for factor in (seed, peak, 1.0)))
        grows = step.count <= middle
        up = jnp.clip((step.count - start) / (middle - start), 0.0, 1.0) if middle > start else 1.0
        down = jnp.clip((step.count - middle) / (end - middle), 0.0, 1.0)

        def move(leaf: Leaf, stage: tuple[int, int, int]) -> Kept:
            least, most, final = stage
            growing = least + jnp.round((most - least) * up)
            pruning = final + jnp.round((most - final) * (1 - down) ** power)
            kept = pattern.kept_sets(leaf.mask, leaf.layout)
            active = kept.sum(-1, keepdims=True)
            more = jnp.maximum(growing.astype(jnp.int32) - active, 0)
            gradient = pattern.sets(scores_.magnitude(leaf.memory), leaf.layout)
            grown = grow_highest(kept, kept, gradient, more)
            size = pattern.sets(scores_.magnitude(leaf.weights), leaf.layout)
            pruned = stay_highest(kept, size, pruning.astype(jnp.int32))
            return with_sets(pattern, jnp.where(grows, grown, pruned), leaf)

        return map_alike(move, leaves, dict(zip(leaves, stages)))

    def spec(chosen: dict[str, Array]) -> Spec:
        return Spec(
            "nest",
            target_density(budget, tree.shapes(chosen), sparsity),
            schedule=schedule,
            gradient_schedule=AnyOf((Through(middle), schedule)),
            pattern=pattern,
            skips_gradient=True,
            grows_by_gradient=True,
            resizes=True,
            has_layout=pattern.has_layout,
        )

    return sparse_transformation(spec, where=where, draw=draw, redraw=redraw, remember=remember)
