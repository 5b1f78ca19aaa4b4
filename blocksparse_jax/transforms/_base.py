"""The frame of every sparse method: choose leaves, draw masks, redraw them on a schedule, mask or
bend the gradient.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from blocksparse_jax import budgets, tree
from blocksparse_jax.layout import Dense, Layout, is_layout
from blocksparse_jax.state import SparseState, Spec


class Leaf(NamedTuple):
    """What a method sees of one sparse leaf at an update: weights, gradient, mask and layout."""

    weights: Array
    grad: Array
    mask: Array
    layout: Layout


Drawn = Mapping[str, tuple[Array, Layout]]
Draw = Callable[[dict[str, Array]], Drawn]
Redraw = Callable[[Any, dict[str, Leaf]], Drawn]


def sparse_transformation(
    spec: Callable[[dict[str, Array]], Spec] | Spec,
    *,
    where: tree.Where | None,
    draw: Draw,
    redraw: Redraw | None = None,
    due: Callable[[Any], Any] | None = None,
    decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """A sparse method from its parts.

    Args:
      spec: what is fixed about the method, or a function of the chosen leaves.
      where: which leaves are sparse.
      draw: chosen weights by name -> (mask, layout) by name, at init.
      redraw: (count, leaves by name) -> the same at an update of the masks; arrays keep their
        shapes.
      due: count -> whether masks are redrawn; None with a `redraw` means at every step.
      decay: straight-through methods add `decay * (1 - mask) * w` to the gradient.

    Returns:
      An optax transformation whose state is a `SparseState`.
    """

    def init(params: PyTree) -> SparseState:
        chosen = tree.choose(where, params)
        drawn = draw(chosen)
        names, structure = _names(params)
        masks = [drawn[name][0] if name in chosen else jnp.asarray(True) for name in names]
        layouts = [drawn[name][1] if name in chosen else Dense() for name in names]
        return SparseState(
            count=jnp.zeros((), jnp.int32),
            masks=jax.tree.unflatten(structure, masks),
            layouts=jax.tree.unflatten(structure, layouts),
            skip_gradient=jnp.asarray(False),
            blind_updates=jnp.zeros((), jnp.int32),
            spec=spec(chosen) if callable(spec) else spec,
        )

    def update(
        updates: PyTree, state: SparseState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, SparseState]:
        del extra_args
        if params is None:
            raise ValueError(
                f"params: {state.spec.method} reads the weights, expected tx.update(grads, state, "
                f"params), got None"
            )
        names, structure = _names(params)
        masks = tree.match("state", state.masks, params)
        layouts = tree.match("state", state.layouts, params, is_leaf=is_layout)
        grads = tree.match("updates", updates, params)
        weights = jax.tree.leaves(params)
        skip, blind = jnp.asarray(False), state.blind_updates
        active = {
            name: Leaf(*leaf)
            for name, leaf in zip(
                names, zip(weights, grads, masks, layouts, strict=True), strict=True
            )
            if jnp.ndim(leaf[2])
        }
        _same_shapes(active)
        if redraw is not None and active:
            kept = {name: (leaf.mask, leaf.layout) for name, leaf in active.items()}
            now = jnp.asarray(True) if due is None else jnp.asarray(due(state.count))
            fresh = (
                redraw(state.count, active)
                if due is None
                else jax.lax.cond(
                    now, lambda leaves: redraw(state.count, leaves), lambda leaves: kept, active
                )
            )
            if state.spec.full_gradient:
                blind = blind + _is_blind(state.spec.method, now, active)
            masks = [
                fresh[name][0] if name in fresh else mask
                for name, mask in zip(names, masks, strict=True)
            ]
            layouts = [
                fresh[name][1] if name in fresh else layout
                for name, layout in zip(names, layouts, strict=True)
            ]
            skip = now if state.spec.skips else skip
        bent = [
            _bend(state.spec, g, m, w, decay) for g, m, w in zip(grads, masks, weights, strict=True)
        ]
        if redraw is not None and state.spec.skips:
            bent = [jnp.where(skip, jnp.zeros_like(g), g) for g in bent]
        new_state = SparseState(
            count=optax.safe_increment(state.count),
            masks=jax.tree.unflatten(structure, masks),
            layouts=jax.tree.unflatten(structure, layouts),
            skip_gradient=skip,
            blind_updates=blind,
            spec=state.spec,
        )
        return jax.tree.unflatten(structure, bent), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _names(params: PyTree) -> tuple[list[str], Any]:
    return [
        tree.path_name(path) for path, _ in jax.tree.leaves_with_path(params)
    ], jax.tree.structure(params)


def _same_shapes(leaves: dict[str, Leaf]) -> None:
    for name, leaf in leaves.items():
        if not leaf.weights.shape == leaf.grad.shape == leaf.mask.shape:
            raise ValueError(
                f"params: expected shape {leaf.mask.shape} at {name!r} as at init, got weights "
                f"{leaf.weights.shape} and gradient "
                f"{leaf.grad.shape}; packed values go with the packed state of pack_tree"
            )


def _is_blind(method: str, now: Array, leaves: dict[str, Leaf]) -> Array:
    """Whether an update happens now and a layer's gradient is zero on all its pruned weights,
    though not on the kept ones.

    Raises ValueError where the values are known (outside of jit).
    """

    def look(leaves: dict[str, Leaf]) -> Array:
        sees = {name: (leaf.grad != 0) for name, leaf in leaves.items()}
        blind = [
            (sees[n] & x.mask).any() & ~(sees[n] & ~x.mask).any() & ~x.mask.all()
            for n, x in leaves.items()
        ]
        return jnp.stack(blind)

    blind = jax.lax.cond(now, look, lambda leaves: jnp.zeros(len(leaves), bool), leaves)
    if not isinstance(blind, jax.core.Tracer) and bool(blind.any()):
        name = next(name for name, is_blind in zip(leaves, blind.tolist(), strict=True) if is_blind)
        raise ValueError(
            f"updates: the gradient at {name!r} is zero on every pruned weight, so {method} can "
            f"grow none; give its update steps the full "
            "gradient: conv(..., kernel_gradient='dense'), likewise in BlockSparseConv, or a dense "
            "convolution of the masked weights"
        )
    return blind.any().astype(jnp.int32)


def _bend(spec: Spec, grad: Array, mask: Array, weights: Array, decay: float) -> Array:
    """The gradient that goes on: masked for hard methods, whole plus the SR-STE term for
    straight-through ones.
    """
    if not spec.straight_through:
        return jnp.where(mask, grad, jnp.zeros_like(grad)) if jnp.ndim(mask) else grad
    if not jnp.ndim(mask) or decay == 0:
        return grad
    return grad + (decay * jnp.where(mask, 0, weights)).astype(grad.dtype)


def check_budget(budget: Any) -> None:
    """ValueError unless it is the name of a budget, or a map to sparsities; whether its names are
    layers shows at init.
    """
    named = dict.fromkeys(budget, (1,)) if isinstance(budget, Mapping) else {}
    budgets.layer_densities(budget, named, 0.0)


def target_density(budget: budgets.Budget, chosen: dict[str, Array], sparsity: float) -> float:
    """The density that a budget asks of the chosen leaves together."""
    shapes = {name: tuple(leaf.shape) for name, leaf in chosen.items()}
    densities = budgets.layer_densities(budget, shapes, sparsity)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    return sum(densities[name] * size for name, size in sizes.items()) / sum(sizes.values())
