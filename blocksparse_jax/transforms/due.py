"""Whether masks change at an update, and what keeps them from it."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from blocksparse_jax import schedules
from blocksparse_jax.alike import flat, map_alike
from blocksparse_jax.state import SparseState
from blocksparse_jax.transforms.leaves import Leaves


def is_due(schedule: schedules.Schedule, count: Array) -> Array:
    """Whether masks change at that count; never at the last int32, where the count stays."""
    return jnp.asarray(schedule(count)) & (count < jnp.iinfo(jnp.int32).max)


def has_moved(state: SparseState, count: Array) -> Array:
    """Whether the update ran since that count: a wrapper such as MultiSteps leaves some out."""
    return (state.count != count) | (count == jnp.iinfo(jnp.int32).max)


def are_finite(leaves: Leaves, *, gradients: bool) -> Array:
    """Whether all weights, and gradients too, are finite.

    Arrays of a dtype are looked at together, which compiles many times as fast, but for those that
    are sharded over explicit axes.
    """
    groups: dict[Any, list[Array]] = {}
    for name, leaf in leaves.items():
        for array in (leaf.weights, leaf.grad) if gradients else (leaf.weights,):
            is_sharded = any(jax.typeof(array).sharding.spec)
            key = (array.dtype, name, id(array)) if is_sharded else array.dtype
            groups.setdefault(key, []).append(array)
    finite = []
    for arrays in groups.values():
        flat = [array.reshape(-1) for array in arrays] if len(arrays) > 1 else arrays
        finite.append(jnp.isfinite(jnp.concatenate(flat) if len(flat) > 1 else flat[0]).all())
    return jnp.stack(finite).all()


def cannot_grow(method: str, due: Array, leaves: Leaves) -> Array:
    """1 where masks change now, and a layer's gradient is zero on all its pruned weights.

    The gradient must not be zero on the kept ones too: then the network has no gradient at all.
    Raises a ValueError where the values are known (outside of jit).
    """

    def look(layer: tuple[Array, Array], _: None) -> Array:
        grad, mask = layer
        nonzero = grad != 0
        parts = jnp.stack([nonzero & mask, nonzero & ~mask, ~mask])
        # One reduction, not three.
        on_kept, on_pruned, pruned = parts.any(tuple(range(1, parts.ndim)))
        return on_kept & ~on_pruned & pruned

    def look_at_all(leaves: Leaves) -> Array:
        layers = {name: (leaf.grad, leaf.mask) for name, leaf in leaves.items()}
        return jnp.stack(list(map_alike(look, flat(layers), dict.fromkeys(layers)).values()))

    stalled = jax.lax.cond(due, look_at_all, lambda leaves: jnp.zeros(len(leaves), bool), leaves)
    if not isinstance(stalled, jax.core.Tracer) and bool(stalled.any()):
        name = list(leaves)[stalled.tolist().index(True)]
        raise ValueError(
            f"updates: the gradient at {name!r} is zero on every pruned weight, so {method} can "
            "grow none; give its update steps the full gradient: conv(..., "
            "kernel_gradient='dense'), likewise in BlockSparseConv, or a dense convolution of the "
            "masked weights"
        )
    return stalled.any().astype(jnp.int32)
