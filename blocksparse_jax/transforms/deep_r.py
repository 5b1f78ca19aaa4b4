"""Deep rewiring: a random walk on the weights that ends a connection where it changes sign."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from blocksparse_jax import _checks, tree
from blocksparse_jax import scores as scores_
from blocksparse_jax.alike import flat, map_alike
from blocksparse_jax.budgets import Budget
from blocksparse_jax.schedules import Always, Schedule, check_schedule
from blocksparse_jax.selection import highest
from blocksparse_jax.spec import Spec
from blocksparse_jax.transforms._base import sparse_transformation
from blocksparse_jax.transforms.first_masks import first_masks
from blocksparse_jax.transforms.leaves import Leaf, Leaves, Step

_ALWAYS = Always()


def deep_r(
    sparsity: float,
    *,
    schedule: Schedule = _ALWAYS,
    rate: float = 0.01,
    temperature: float = 1e-5,
    final_temperature: float = 1e-15,
    l1: float = 1e-5,
    budget: Budget = "erk",
    where: tree.Where | None = None,
    key: Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Deep-R: noise and L1 on the kept weights; one that changes its sign makes room for another.

    Each connection has a fixed sign s. After the optimizer, at every step of the schedule, each
    kept weight takes `w <- w - rate * l1 * s + sqrt(2 * rate * T) * n`, n standard normal. Those
    that point against their sign then (`s * w < 0`) are pruned, and as many connections of the same
    layer come back, uniformly at random among all that are pruned now, the just pruned ones
    included. They start at zero. So every layer keeps its count at every step.

    The temperature T falls geometrically from `temperature` to `final_temperature` by the end of
    the schedule; without an end it stays.

    Args:
      sparsity: fraction of the chosen weights to remove, in [0, 1).
      schedule: the steps with noise and rewiring; the paper: every step, `between(0, last_step)`.
      rate: of the noise and of L1, where the paper has the learning rate.
      temperature: T at the schedule's start, at least 0 (no noise).
      final_temperature: T at its end, above 0 and at most `temperature`; without noise ignored.
      l1: pull towards zero, at least 0.
      budget: "erk", "uniform", "er", "global", or a map layer name -> sparsity.
      where: predicate (name, leaf) of the sparse leaves, default conv kernels except the stem.
      key: JAX random key of masks, noise and growth; None is `jax.random.key(0)`, the same in every
        run.

    Returns:
      An optax transformation that masks gradients; it acts on the proposed weights, so put it
      inside `keep_zeros` (`sparse(method, optimizer)` does both).

    Raises:
      ValueError: a bad argument.

    Example:
      >>> import blocksparse_jax as bsj
      >>> tx = bsj.sparse(deep_r(0.9, temperature=50.0), optax.sgd(0.1))
      >>> params = {"w": jnp.ones((3, 3, 8, 8))}
      >>> state = tx.init(params)
      >>> before = bsj.get_masks(state)
      >>> _, state = tx.update(params, state, params)
      >>> after = bsj.get_masks(state)
      >>> int(after["w"].sum()), bool((before["w"] != after["w"]).any())
      (58, True)

    Reference: Bellec et al., "Deep rewiring: training very sparse deep networks", ICLR 2018,
    algorithm 1. Our choice: a connection's sign is that of its weight at init; `rate` is a number
    of its own, since the optimizer's learning rate is not known here; T falls geometrically between
    the two temperatures of a public implementation; counts stay in every layer. The sign belongs to
    a single weight, so there are no other patterns.
    """
    first = first_masks(sparsity, None, budget, "random", key)
    check_schedule(schedule)
    rate = _checks.number("rate", rate)
    temperature = _checks.number("temperature", temperature)
    final_temperature = _checks.number("final_temperature", final_temperature, low_open=True)
    l1 = _checks.number("l1", l1)
    if temperature and final_temperature > temperature:
        raise ValueError(
            f"final_temperature: expected at most temperature={temperature}, got "
            f"{final_temperature}"
        )
    start, until = getattr(schedule, "start", 0), getattr(schedule, "until", None)

    def noise_size(count: Array) -> Float[Array, ""]:
        if not temperature or until is None:
            return jnp.sqrt(jnp.float32(2 * rate * temperature))
        elapsed = jnp.clip((count - start) / (until - start), 0.0, 1.0)
        cooling = jnp.exp(elapsed * jnp.log(jnp.float32(final_temperature / temperature)) / 2)
        return jnp.sqrt(jnp.float32(2 * rate * temperature)) * cooling

    def rewire(step: Step, leaves: Leaves) -> Leaves:
        step_key = jax.random.fold_in(first.key, step.count)
        size = noise_size(step.count)

        def rewire_one(layer: tuple[Leaf, Array], _: None) -> tuple[Array, Array]:
            leaf, place = layer
            keys = jax.random.split(jax.random.fold_in(step_key, place))
            sign = jnp.where(leaf.memory < 0, -1.0, 1.0)
            noise = size * jax.random.normal(keys[0], leaf.weights.shape, jnp.float32)
            moved = leaf.weights.astype(jnp.float32) - rate * l1 * sign + noise
            moved = moved.astype(leaf.weights.dtype)
            stays = leaf.mask & (moved * sign >= 0)
            revived = jnp.where(stays, -jnp.inf, scores_.random(keys[1], leaf.mask.shape))
            mask = stays | highest(revived, leaf.mask.sum() - stays.sum())
            return jnp.where(stays, moved, 0), mask

        layers = {
            name: (leaf, jnp.int32(place)) for place, (name, leaf) in enumerate(leaves.items())
        }
        rewired = map_alike(rewire_one, flat(layers), dict.fromkeys(layers))
        return {
            name: leaf._replace(
                weights=rewired[name][0].reshape(leaf.mask.shape),
                mask=rewired[name][1].reshape(leaf.mask.shape),
            )
            for name, leaf in leaves.items()
        }

    return sparse_transformation(
        lambda chosen: Spec(
            "deep-r",
            first.density(chosen),
            schedule=schedule,
            pattern=first.pattern,
            on_proposed=rewire,
        ),
        where=where,
        draw=first.at_init,
        memory=lambda leaf: jnp.where(leaf < 0, -1, 1).astype(jnp.int8),
    )
