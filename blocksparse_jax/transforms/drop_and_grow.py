"""Dynamic sparse training: at each update the weakest sets of weights make room for others."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from blocksparse_jax import _checks, schedules, tree
from blocksparse_jax import scores as scores_
from blocksparse_jax.alike import map_alike
from blocksparse_jax.budgets import Budget
from blocksparse_jax.patterns import Kept, Pattern, unstructured
from blocksparse_jax.schedules import AnyOf, Never, Schedule, Through, check_schedule
from blocksparse_jax.spec import Spec
from blocksparse_jax.transforms._base import sparse_transformation
from blocksparse_jax.transforms.exchange import grow_highest, map_layers, stay_highest, with_sets
from blocksparse_jax.transforms.first_masks import FirstMasks, first_masks
from blocksparse_jax.transforms.leaves import Leaf, Leaves, Step

Rule = Literal["magnitude", "gradient", "momentum", "random"] | Callable[[Leaf], Array]
RULES = ("magnitude", "gradient", "momentum", "random")


def drop_and_grow(
    sparsity: float | None,
    *,
    pattern: Pattern | None = None,
    drop: Rule | Literal["signed"] = "magnitude",
    grow: Rule = "gradient",
    fraction: float = 0.3,
    schedule: Schedule,
    budget: Budget = "erk",
    scores: scores_.Kind | PyTree = "random",
    momentum: float = 0.9,
    where: tree.Where | None = None,
    key: Array | None = None,
    name: str = "drop-and-grow",
) -> optax.GradientTransformationExtraArgs:
    """Drops the sets of weights with the lowest scores and grows as many others.

    At each step of the schedule every row of the pattern with n active sets drops a part f of them,
    `f = fraction / 2 * (1 + cos(pi * (t - start) / (until - start)))` (`until` is the first step
    after the schedule's end; without an end f is constant), keeps those with the highest `drop`
    scores, and grows as many with the highest `grow` scores among all others, the just dropped ones
    included. Single weights move `floor(f * n)`, as in RigL; patterns with few sets in a row the
    nearest number. Grown weights start at zero with fresh moments (under `keep_zeros`), and that
    step applies no gradient though it counts as one. Groups and taps of HRBP's blocks stay as they
    were drawn.

    Masks stay as they are where a weight, or a gradient they are grown by, is not finite;
    `nonfinite_updates` in the state counts these updates, and `summarize` shows them.

    Growing by gradient, by momentum or by a function needs the full gradient at the steps that
    `get_spec(state).dense_gradient` names (momentum: at every step); where it is zero on every
    pruned weight of a layer, the update raises a ValueError, or inside jit counts in
    `stalled_updates`, which `summarize` shows.

    Args:
      sparsity: fraction of the chosen weights to remove, in [0, 1); None where the pattern fixes
        it.
      pattern: which sets of weights are kept together; None is `patterns.unstructured()`.
      drop: scores of what stays: "magnitude" (`|w|`), "gradient" (`|g|`), "momentum", "random", or
        a function of a `Leaf` that returns scores in its shape. "signed" is SET's rule for single
        weights: the part f of the positive and of the negative ones each goes, those nearest to
        zero, and every weight that is zero.
      grow: scores of what is grown, likewise. A function forbids growth by -inf; where too few sets
        are left to grow, dropped ones stay, so that the count stays.
      fraction: the part that moves at the start of the schedule, in [0, 1].
      schedule: when, e.g. `every(100, until=75_000)`.
      budget: "erk", "uniform", "er", "global" (of the first scores; with a pattern that has a
        layout: outside of jit, and not with `scores="gradient"`), or a map layer name -> sparsity.
      scores: of the first masks: "random", "magnitude", "gradient" (`|g|` of the first update), or
        a tree of arrays.
      momentum: decay of the gradient's moving average that "momentum" scores by, in [0, 1).
      where: predicate (name, leaf) of the sparse leaves, default conv kernels except the stem.
      key: JAX random key of random masks and growth; None is `jax.random.key(0)`, the same in every
        run. Two methods in one chain need two keys: with one, layers of the same shape would draw
        the same masks.
      name: of the method, for reports.

    Returns:
      An optax transformation that masks gradients; put it first in the chain, inside `keep_zeros`
      (`sparse(method, optimizer)` does both).

    Raises:
      ValueError: a bad argument, or at init a chosen leaf that the pattern cannot divide.

    Example:
      >>> import blocksparse_jax as bsj
      >>> method = drop_and_grow(
      ...     0.9, pattern=bsj.patterns.kernel(), schedule=bsj.every(100, until=75_000))
      >>> state = bsj.sparse(method, optax.sgd(0.1)).init({"w": jnp.ones((3, 3, 32, 32))})
      >>> int(bsj.get_masks(state)["w"].any((0, 1)).sum()), bsj.get_spec(state).changes(200)
      (102, True)

    Reference: Evci et al., "Rigging the lottery", ICML 2020, algorithm 1 (the frame); Mocanu et
    al., 2018 (random growth); Dettmers & Zettlemoyer, 2019 (momentum). Our choice: `every` has no
    update at its start, before anything is learnt.
    """
    first = first_masks(sparsity, pattern, budget, scores, key)
    _checks.fraction("fraction", fraction, high_open=False)
    _checks.fraction("momentum", momentum)
    check_schedule(schedule)
    for rule_name, rule, rules in (("drop", drop, (*RULES, "signed")), ("grow", grow, RULES)):
        if not callable(rule):
            _checks.choice(rule_name, rule, rules)
    if drop == "signed" and first.pattern != unstructured():
        raise ValueError(
            f"drop: 'signed' tells positive weights from negative ones, and {first.pattern.noun} "
            "hold both; use drop='magnitude' or patterns.unstructured()"
        )
    start, until = getattr(schedule, "start", 0), getattr(schedule, "until", None)

    def move(step: Step, leaves: Leaves) -> dict[str, Kept]:
        part = schedules.cosine_fraction(fraction, step.count, start, until)
        step_key = jax.random.fold_in(first.key, step.count)

        def move_one(layer: tuple[Leaf, Array], _: None) -> Kept:
            leaf, place = layer
            keys = jax.random.split(jax.random.fold_in(step_key, place))
            if drop == "signed":
                return _exchange_by_sign(leaf, _scores(grow, leaf, keys[1]), part)
            drop_scores, grow_scores = (_scores(r, leaf, k) for r, k in zip((drop, grow), keys))
            return _exchange_sets(first.pattern, leaf, drop_scores, grow_scores, part)

        layers = {
            name: (leaf, jnp.int32(place)) for place, (name, leaf) in enumerate(leaves.items())
        }
        if callable(drop) or callable(grow):  # which may look at the shape of a layer
            return map_alike(move_one, layers, dict.fromkeys(layers))
        return map_layers(move_one, first.pattern, layers, dict.fromkeys(layers))

    def redraw(step: Step, leaves: Leaves) -> dict[str, Kept]:
        if not first.by_gradient:
            return move(step, leaves)
        return jax.lax.cond(
            step.count == 0, first.from_gradient, lambda leaves: move(step, leaves), leaves
        )

    def remember(step: Step, leaf: Leaf) -> Array:
        grad = leaf.grad.astype(jnp.float32)
        average = momentum * leaf.memory + (1 - momentum) * grad
        return jnp.where(jnp.isfinite(grad), average, leaf.memory)

    by_momentum = "momentum" in (drop, grow)
    spec = _publish(name, first, schedule, (drop, grow))
    return sparse_transformation(
        lambda chosen: spec(first.density(chosen)),
        where=where,
        draw=first.at_init,
        redraw=redraw,
        remember=remember if by_momentum else None,
    )


def _publish(
    name: str, first: FirstMasks, schedule: Schedule, rules: tuple[Rule | str, Rule]
) -> Callable[[float], Spec]:
    """Density -> what the method publishes."""
    until = getattr(schedule, "until", None)
    if first.by_gradient:
        schedule = AnyOf((Through(0), schedule))
    reads_gradient = any(callable(rule) or rule in ("gradient", "momentum") for rule in rules)
    gradient_schedule: Schedule = schedule if reads_gradient or first.by_gradient else Never()
    if "momentum" in rules:
        gradient_schedule = schedules.Always() if until is None else Through(until - 1)
    return lambda density: Spec(
        name,
        density,
        schedule=schedule,
        gradient_schedule=gradient_schedule,
        pattern=first.pattern,
        skips_gradient=True,
        grows_by_gradient=reads_gradient or first.by_gradient,
        has_layout=first.pattern.has_layout,
    )


def _scores(rule: Rule | str, leaf: Leaf, key: Array) -> Float[Array, "..."]:
    """The scores of a leaf's weights by a rule."""
    if callable(rule):
        return rule(leaf)
    if rule == "random":
        return scores_.random(key, leaf.weights.shape)
    values = {"magnitude": leaf.weights, "gradient": leaf.grad, "momentum": leaf.memory}
    return scores_.magnitude(values[rule])


def _exchange_sets(
    pattern: Pattern, leaf: Leaf, drop: Array, grow: Array, part: Float[Array, ""]
) -> Kept:
    """Drops a part of the kept sets, those with the lowest `drop`, and grows as many by `grow`."""
    kept = pattern.kept_sets(leaf.mask, leaf.layout)
    active = kept.sum(-1, keepdims=True)
    count = pattern.moves(part, active)
    stays = stay_highest(kept, pattern.sets(drop, leaf.layout), active - count)
    new = grow_highest(stays, kept, pattern.sets(grow, leaf.layout), count)
    return with_sets(pattern, new, leaf)


def _exchange_by_sign(leaf: Leaf, grow: Array, part: Float[Array, ""]) -> Kept:
    """Drops a part of the positive and of the negative weights, and all zeros; grows as many."""
    kept, weights, size = (
        array.reshape(1, -1) for array in (leaf.mask, leaf.weights, scores_.magnitude(leaf.weights))
    )
    stays = jnp.zeros_like(kept)
    for side in (kept & (weights > 0), kept & (weights < 0)):
        number = side.sum()
        dropped = jnp.floor(part * number.astype(part.dtype)).astype(jnp.int32)
        stays |= stay_highest(side, size, number - dropped)
    new = grow_highest(stays, kept, grow.reshape(1, -1), kept.sum() - stays.sum())
    return Kept(new.reshape(leaf.mask.shape), leaf.layout)
