"""Dynamic sparse reparameterization: one threshold prunes all layers, and weights move between."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from blocksparse_jax import _checks, tree
from blocksparse_jax import scores as scores_
from blocksparse_jax.alike import flat, map_alike
from blocksparse_jax.budgets import Budget
from blocksparse_jax.patterns import Kept, Pattern, unstructured
from blocksparse_jax.schedules import Schedule, check_schedule
from blocksparse_jax.spec import Spec
from blocksparse_jax.transforms._base import sparse_transformation
from blocksparse_jax.transforms.exchange import grow_highest, stay_highest, with_sets
from blocksparse_jax.transforms.first_masks import first_masks
from blocksparse_jax.transforms.leaves import Leaf, Leaves, Step


def dsr(
    sparsity: float,
    *,
    schedule: Schedule,
    pattern: Pattern | None = None,
    threshold: float = 1e-3,
    fraction: float = 0.1,
    budget: Budget = "uniform",
    where: tree.Where | None = None,
    key: Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """DSR: prunes below one adaptive threshold, and grows as many again where weights survive.

    After the optimizer, at each step of the schedule, every set of weights whose mean `|w|` is
    below the threshold H goes, in all layers. As many are grown at random, shared among the layers
    in proportion to their surviving sets, never where one was just pruned, with zero weights. So
    the sets of all layers together keep their number, and layers gain or lose. Then H is halved if
    more than 1.1 N went, and doubled if fewer than 0.9 N did, with N = `fraction` of the sets that
    are kept.

    Every layer keeps at least its largest set. Where fewer places are free in the whole network
    than sets went, the largest of the pruned ones stay; a layer without free places leaves its
    share to the others.

    While the counts change, `get_layouts(state)` reads the layouts of patterns that have one from
    the masks, outside of jit.

    Args:
      sparsity: fraction of the chosen weights to remove, in [0, 1).
      schedule: when sets move, e.g. `every(100, until=75_000)`; the authors' code: every 100, 200,
        400 and 800 steps from epoch 0, 25, 80 and 140 of 200 on.
      pattern: `patterns.unstructured()` (None), `patterns.kernel("mean")` (the paper's kernels), or
        `patterns.channel(side)`: patterns with one row of sets in a layer.
      threshold: H at the start, above 0.
      fraction: N, as a fraction of the kept sets, in (0, 1).
      budget: of the first masks, drawn at random: "uniform", "erk", "er", "global", or a map layer
        name -> sparsity.
      where: predicate (name, leaf) of the sparse leaves, default conv kernels except the stem.
      key: JAX random key of masks and growth; None is `jax.random.key(0)`, the same in every run.

    Returns:
      An optax transformation that masks gradients; it acts on the proposed weights, so put it
      inside `keep_zeros` (`sparse(method, optimizer)` does both).

    Raises:
      ValueError: a bad argument, or a pattern with more rows of sets than one in a chosen layer.

    Example:
      >>> import blocksparse_jax as bsj
      >>> tx = bsj.sparse(dsr(0.5, schedule=bsj.every(1), threshold=0.5), optax.sgd(0.1))
      >>> params = {name: scale * jnp.ones((1, 1, 8, 8)) for name, scale in (("a", 0.1), ("b", 9))}
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     _, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
      >>> {name: int(mask.sum()) for name, mask in bsj.get_masks(state).items()}
      {'a': 2, 'b': 62}

    Reference: Mostafa & Wang, "Parameter efficient training of deep convolutional neural networks
    by dynamic sparse reparameterization", ICML 2019, algorithm 1. Our choice: N as a fraction (the
    authors' code: 20,000 weights of WRN-28-2 and 400,000 of ResNet-50, about a tenth at 90% and 80%
    sparsity), the set that every layer keeps, and where sets go that find no place.
    """
    first = first_masks(sparsity, pattern, budget, "random", key)
    check_schedule(schedule)
    threshold = _checks.number("threshold", threshold, low_open=True)
    _checks.fraction("fraction", fraction, low_open=True)

    def draw(chosen: dict[str, Array]) -> dict[str, Kept]:
        for name, leaf in chosen.items():
            _check_rows(first.pattern, leaf.shape, name)
        kept = first.at_init(chosen)
        return {
            name: Kept(kept[name].mask, first.pattern.shrinking(leaf.shape))
            for name, leaf in chosen.items()
        }

    def rewire(step: Step, leaves: Leaves) -> Leaves:
        limit = next(iter(leaves.values())).memory
        number = len(leaves)

        def look(leaf: Leaf, _: None) -> tuple[Array, Array, Array]:
            kept, sizes = _sets(first.pattern, leaf)
            survivors = jnp.maximum((kept & (sizes >= limit)).sum(), 1)
            return kept.sum(), survivors, jnp.int32(kept.size)

        fold = flat if first.pattern == unstructured() else dict  # by size, not by shape
        seen = map_alike(look, fold(leaves), dict.fromkeys(leaves))
        kept, survivors, places = (jnp.stack(column) for column in zip(*seen.values()))
        removed = kept - survivors
        gone, free = removed.sum(), (places - kept).sum()
        back = share(jnp.maximum(gone - free, 0), removed, removed, number)
        grown = share(jnp.minimum(gone, free), survivors, places - kept, number)
        step_key = jax.random.fold_in(first.key, step.count)

        def move(layer: tuple[Leaf, Array, Array, Array], _: None) -> tuple[Array, Array]:
            leaf, place, staying, growing = layer
            kept, sizes = _sets(first.pattern, leaf)
            stays = stay_highest(kept, sizes, staying)
            noise = scores_.random(jax.random.fold_in(step_key, place), kept.shape)
            new = grow_highest(stays, kept, jnp.where(kept, -jnp.inf, noise), growing)
            return with_sets(first.pattern, new, leaf).mask, jnp.where(leaf.mask, leaf.weights, 0)

        layers = {
            name: (leaf, jnp.int32(place), (survivors + back)[place], grown[place])
            for place, (name, leaf) in enumerate(leaves.items())
        }
        moved = map_alike(move, fold(layers), dict.fromkeys(layers))
        aim, pruned = fraction * kept.sum().astype(jnp.float32), gone.astype(jnp.float32)
        factor = jnp.where(pruned > 1.1 * aim, 0.5, jnp.where(pruned < 0.9 * aim, 2.0, 1.0))
        return {
            name: leaf._replace(
                mask=moved[name][0].reshape(leaf.mask.shape),
                weights=moved[name][1].reshape(leaf.mask.shape),
                memory=leaf.memory * factor,
            )
            for name, leaf in leaves.items()
        }

    return sparse_transformation(
        lambda chosen: Spec(
            "dsr",
            first.density(chosen),
            schedule=schedule,
            pattern=first.pattern,
            resizes=True,
            has_layout=first.pattern.has_layout,
            on_proposed=rewire,
        ),
        where=where,
        draw=draw,
        memory=lambda leaf: jnp.float32(threshold),
    )


def share(
    total: Int[Array, ""], weights: Int[Array, " n"], places: Int[Array, " n"], rounds: int
) -> Int[Array, " n"]:
    """Shares a whole number in proportion to weights, no more than there are places.

    Args:
      total: at most the sum of the places.
      weights: at least 0 each.
      places: the most that each takes; what is above goes to the others, in proportion again.
      rounds: as many as there are weights are enough.

    Returns:
      Whole numbers that add up to the total.

    Example:
      >>> share(jnp.int32(10), jnp.array([1, 3, 4]), jnp.array([9, 9, 4]), 3).tolist()
      [1, 5, 4]
    """

    def give(_: Array, shares: Array) -> Array:
        room = places - shares
        part = jnp.cumsum(jnp.where(room > 0, weights, 0).astype(jnp.float32))
        left = (total - shares.sum()).astype(jnp.float32)
        ends = jnp.round(left * (part / jnp.maximum(part[-1], 1))).astype(jnp.int32)
        return shares + jnp.clip(jnp.diff(ends, prepend=0), 0, room)

    shares = jax.lax.fori_loop(0, rounds, give, jnp.zeros_like(places))
    # What is left without weights, and by rounding: wherever there are places.
    room = places - shares
    before = jnp.cumsum(room) - room
    return shares + jnp.clip(total - shares.sum() - before, 0, room)


def _sets(pattern: Pattern, leaf: Leaf) -> tuple[Array, Float[Array, "1 sets"]]:
    """Which sets are kept, and the mean `|w|` of each."""
    sizes = pattern.sets(scores_.magnitude(leaf.weights), leaf.layout)
    return pattern.kept_sets(leaf.mask, leaf.layout), pattern.comparable(
        sizes, pattern.units(leaf.mask.shape)
    )


def _check_rows(pattern: Pattern, shape: tuple[int, ...], name: str) -> None:
    rows = pattern.units(shape, f"params[{name!r}]").rows
    if rows > 1:
        raise ValueError(
            f"pattern: dsr moves single sets between layers, and {pattern} divides {name!r} into "
            f"{rows} rows that keep as many each; use patterns.unstructured(), "
            'patterns.kernel("mean") or patterns.channel("input")'
        )
